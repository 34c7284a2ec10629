"""How far a job is: a bar on a terminal, else a log line every ten seconds.

Knows counts; nothing of who makes them.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxinfer.batch.pump import Counts
from jaxinfer.logging import get_logger

logger = get_logger(__name__)

LOG_EVERY_S = 10.0
_DRAW_EVERY_S = 0.5


class Meter:
    """The figures of a run. `num_before` lines of `total` (None: not known) were done before it."""

    def __init__(self, counts: Counts, *, num_before: int, total: int | None) -> None:
        self._counts = counts
        self._num_before = num_before
        self._total = total
        self._start_s = time.monotonic()

    @property
    def num_done(self) -> int:
        return self._num_before + self._counts.num_done

    @property
    def total(self) -> int | None:
        return self._total

    def __str__(self) -> str:
        counts = self._counts
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        of = "" if self._total is None else f"/{self._total}"
        failed = f", {counts.num_failed} failed" if counts.num_failed else ""
        return (
            f"{self.num_done}{of} lines{failed}, {counts.num_in_work} in work, "
            f"{counts.num_prompt_tokens / elapsed_s:.0f} tokens/s in, "
            f"{counts.num_output_tokens / elapsed_s:.0f} out, {self._eta(elapsed_s)} left"
        )

    def _eta(self, elapsed_s: float) -> str:
        if self._total is None or not self._counts.num_done:
            return "unknown time"
        rest = max(0, self._total - self.num_done)
        return shown_duration(rest * elapsed_s / self._counts.num_done)


def shown_duration(seconds: float) -> str:
    """75 -> "1:15", 7500 -> "2:05:00"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@asynccontextmanager
async def shown_progress(
    meter: Meter, *, stream: TextIO | None = None, log_every_s: float = LOG_EVERY_S
) -> AsyncIterator[None]:
    """Shows `meter` on `stream` (default: stderr) while the block runs."""
    console = Console(file=stream or sys.stderr)
    bars = Progress(BarColumn(), TextColumn("{task.fields[figures]}"), console=console)
    task = bars.add_task("lines", total=meter.total, figures="")

    async def draw() -> None:
        while True:
            bars.update(task, completed=meter.num_done, figures=str(meter))
            await asyncio.sleep(_DRAW_EVERY_S)

    async def tell() -> None:
        while True:
            await asyncio.sleep(log_every_s)
            logger.info("%s", meter)

    with bars if console.is_terminal else nullcontext():
        teller = asyncio.create_task(draw() if console.is_terminal else tell())
        try:
            yield
        finally:
            teller.cancel()
            await asyncio.gather(teller, return_exceptions=True)
            bars.update(task, completed=meter.num_done, figures=str(meter))
