"""What the log says while the engine starts (or restarts): phases, how far they are, which hangs.

The beginning and the end of a phase are logged by who does the work; here is what they cannot say
themselves while they work, or hang. Knows phases and time; not what is started.
"""

import asyncio
import time
from collections.abc import Callable

from jaxinfer.core.progress import shown_amount
from jaxinfer.logging import get_logger

logger = get_logger(__name__)

TELL_EVERY_S = 10.0


class StartupLog:
    """A ProgressCallback, for any thread. `on_phase` gets the phase in words, for /ready."""

    def __init__(
        self, on_phase: Callable[[str], None], *, tell_every_s: float = TELL_EVERY_S
    ) -> None:
        self._on_phase = on_phase
        self._tell_every_s = tell_every_s
        self._phase = ""
        self._shown = ""
        self._phase_began_s = self._moved_s = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        shown = f"{phase} {shown_amount(done, total)}".rstrip()
        if phase != self._phase:
            self._phase, self._phase_began_s = phase, now_s
        if shown != self._shown:
            self._shown, self._moved_s = shown, now_s
            self._on_phase(shown)

    async def watch(self, is_over: Callable[[], bool]) -> None:
        """Says every few seconds what goes on (a phase that hangs shows), but not while `is_over`.

        Runs until it is cancelled: an engine may be started again.
        """
        while True:
            await asyncio.sleep(self._tell_every_s)
            if is_over():
                continue
            now_s = time.monotonic()
            in_phase_s, still_s = now_s - self._phase_began_s, now_s - self._moved_s
            if still_s >= self._tell_every_s:
                logger.warning(
                    "still in phase %r since %.0f s, no progress for %.0f s",
                    self._shown,
                    in_phase_s,
                    still_s,
                )
            elif in_phase_s >= self._tell_every_s:
                logger.info("%s (%.0f s)", self._shown, in_phase_s)
