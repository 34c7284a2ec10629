"""A child process that is watched: its output goes to stderr with a prefix, its end is announced.

Knows processes and pipes only.
"""

import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

_NUM_KEPT_LINES = 20

STACKS_SIGNAL = signal.SIGUSR1
"""Makes a child that registered it with `faulthandler` write all its stacks to its log."""


class ChildProcess:
    """Starts `command` in a session of its own, so that Ctrl-C reaches only its parent.

    `stdin` stays open until `close_stdin`. `on_exit` is called once, in another thread.
    """

    def __init__(self, command: list[str], *, name: str, on_exit: Callable[[], None]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self.pid = self._process.pid
        self._prefix = f"[{name} {self.pid}] "
        self._on_exit = on_exit
        self._last_lines: deque[str] = deque(maxlen=_NUM_KEPT_LINES)
        self._log = threading.Thread(
            target=self._forward_log, args=(self._process.stdout,), name=f"{name}-log", daemon=True
        )
        self._wait = threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True)
        self._log.start()
        self._wait.start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -N when signal N ended it."""
        return self._process.returncode

    @property
    def last_lines(self) -> list[str]:
        """The end of its output, for the message that says why it died."""
        return list(self._last_lines)

    def dump_stacks(self) -> None:
        """Asks for the stacks of all threads; works while the child is stuck in C.

        A child that was stopped (SIGSTOP, a debugger) is let go on: it could not answer, nor be
        terminated.
        """
        self._process.send_signal(STACKS_SIGNAL)
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def join(self, timeout_s: float) -> bool:
        """True when the process has ended and its output was read."""
        deadline_s = time.monotonic() + timeout_s
        self._wait.join(timeout_s)
        self._log.join(max(0.0, deadline_s - time.monotonic()))
        return not self._wait.is_alive()

    def close_stdin(self) -> None:
        """The child takes this for the end of its parent."""
        with suppress(BrokenPipeError):  # it died with our last bytes unread
            self.stdin.close()

    def _watch(self) -> None:
        self._process.wait()
        self._on_exit()

    def _forward_log(self, stream: BinaryIO) -> None:
        with stream:
            for raw in stream:
                line = raw.decode(errors="replace")
                self._last_lines.append(line.rstrip())
                sys.stderr.write(self._prefix + line)
                sys.stderr.flush()
