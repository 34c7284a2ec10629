"""Ctrl-C between the steps of an engine, never inside one.

A KeyboardInterrupt in the middle of a step would leave scheduler and device in disagreement.
Knows signals only.
"""

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """While this is open, the first Ctrl-C is kept for `check`; a second one works at once."""

    def __init__(self) -> None:
        self._came = False
        self._is_installed = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._came:
            raise KeyboardInterrupt

    def __enter__(self) -> "Interrupts":
        # Only the main thread may set handlers, and only Python's own one raises the exception
        # that is to be put off: a program's handler stays.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._handle)
            self._is_installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._is_installed = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if self._came:
            raise KeyboardInterrupt
        self._came = True
