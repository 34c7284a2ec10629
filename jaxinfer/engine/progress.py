"""Shows how far a start-up or a batch is: bars on a terminal, nothing elsewhere.

(Off the terminal the engine's log has one line per phase.) Knows nothing of engines.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxinfer.engine.build import ProgressCallback, ignore_progress


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


@contextmanager
def start_progress() -> Iterator[ProgressCallback]:
    """One bar per phase of a start-up."""
    bars = _bars()
    tasks = {}

    def report(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = bars.add_task(phase)
        bars.update(tasks[phase], completed=done, total=total or None)

    if not bars.console.is_terminal:
        yield ignore_progress
        return
    with bars:
        yield report


@contextmanager
def batch_progress(total: int, *, is_shown: bool) -> Iterator[Callable[[], None]]:
    """A bar of `total` prompts; the callable counts one."""
    bars = _bars()
    if not is_shown or not bars.console.is_terminal:
        yield _ignore_one
        return
    with bars:
        task = bars.add_task("prompts", total=total)
        yield lambda: bars.advance(task)


def _ignore_one() -> None:
    pass
