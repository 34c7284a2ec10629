"""Shows how far a start-up or a batch is: bars on a terminal, elsewhere a line a phase, if asked.

(Elsewhere the log has a line when a phase begins and one when it ends, which whoever does the work
writes; the lines are for commands whose log is quiet.) Writes to stderr,
so that answers on stdout stay clean. Knows nothing of engines.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxinfer.core.progress import ProgressCallback, ignore_progress, shown_amount


def _bars(stream: TextIO | None = None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        console=Console(file=stream or sys.stderr),
        transient=True,
    )


@contextmanager
def start_progress(
    stream: TextIO | None = None, *, with_lines: bool = False
) -> Iterator[ProgressCallback]:
    """One bar per phase of a start-up, on `stream` (default: stderr).

    If that is no terminal: nothing, or `with_lines` a line when a phase begins, and one at the end.
    """
    bars = _bars(stream)
    tasks = {}

    def report(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            for earlier in tasks.values():  # phases follow one another: their clocks stop
                bars.update(earlier, completed=1, total=1)
                bars.stop_task(earlier)
            tasks[phase] = bars.add_task(phase, amount="")
        bars.update(
            tasks[phase], completed=done, total=total or None, amount=shown_amount(done, total)
        )

    if not bars.console.is_terminal:
        if not with_lines:
            yield ignore_progress
            return
        lines = _Lines(stream or sys.stderr)
        yield lines
        lines("ready", 0, 0)
        return
    with bars:
        yield report


class _Lines:
    """A ProgressCallback that writes each phase once, with the seconds since the start."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase = ""
        self._began_s = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        del done, total
        if phase != self._phase:
            self._phase = phase
            elapsed_s = time.monotonic() - self._began_s
            print(f"jaxinfer: {elapsed_s:5.1f} s: {phase}", file=self._stream, flush=True)


@contextmanager
def batch_progress(total: int, *, is_shown: bool) -> Iterator[Callable[[], None]]:
    """A bar of `total` prompts; the callable counts one."""
    bars = _bars()
    if not is_shown or not bars.console.is_terminal:
        yield _ignore_one
        return
    with bars:
        task = bars.add_task("prompts", total=total, amount=shown_amount(0, total))
        num_done = 0

        def count() -> None:
            nonlocal num_done
            num_done += 1
            bars.update(task, completed=num_done, amount=shown_amount(num_done, total))

        yield count


def _ignore_one() -> None:
    pass
