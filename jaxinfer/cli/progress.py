"""Shows how far a long start has come: one moving line on a terminal, else one log line a phase.

Knows phases by name only. Writes to stderr, so that answers on stdout stay clean.
"""

import sys
import time
from typing import TextIO

from jaxinfer.logging import get_logger

_logger = get_logger(__name__)
_MIN_REDRAW_S = 0.05


def _amount(done: int, total: int) -> str:
    if total <= 0:
        return ""
    if total >= 10 * 2**20:  # only bytes come in such numbers
        return f" {done / 2**20:.0f}/{total / 2**20:.0f} MiB"
    return f" {done}/{total}"


class PhaseReporter:
    """A callable (phase, done, total) that prints; `close` ends the line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._phase = ""
        self._phase_start_s = self._last_draw_s = time.monotonic()

    def __call__(self, phase: str, done: int = 0, total: int = 0) -> None:
        now_s = time.monotonic()
        if phase != self._phase:
            self._end_phase(now_s)
            self._phase, self._phase_start_s = phase, now_s
            if not self._is_terminal:
                _logger.info("%s ...", phase)
        elif now_s - self._last_draw_s < _MIN_REDRAW_S and done != total:
            return
        if self._is_terminal:
            self._last_draw_s = now_s
            self._stream.write(f"\r\x1b[K{phase}{_amount(done, total)}")
            self._stream.flush()

    def show_on_terminal(self, phase: str, done: int, total: int) -> None:
        """The same without the log lines: for phases that someone else logs."""
        if self._is_terminal:
            self(phase, done, total)

    def _end_phase(self, now_s: float) -> None:
        if not self._phase:
            return
        seconds = now_s - self._phase_start_s
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{self._phase}: {seconds:.1f} s\n")
            self._stream.flush()
        else:
            _logger.info("%s done in %.1f s", self._phase, seconds)

    def close(self) -> None:
        """Ends the phase that runs."""
        self._end_phase(time.monotonic())
        self._phase = ""
