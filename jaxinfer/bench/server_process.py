"""A server as a child process: started, waited for, and ended, whoever made it.

Knows processes and one URL that answers 200 when the server is ready.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import yaml

from jaxinfer.config.fields import flatten
from jaxinfer.config.schema import ServeConfig
from jaxinfer.errors import ConfigError, EngineDeadError

_POLL_S = 0.1
_STOP_S = 20.0
_NUM_SHOWN_LINES = 30


class ServerProcess:
    """A context manager: inside of it, the server answers at `base_url`.

    What it writes goes to a temporary file, of which the end is shown when it does not start.
    A SIGTERM to this process ends both in order: as SystemExit(143), where nobody handles it yet.
    Raises EngineDeadError when it ends, or is not ready after `timeout_s`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        base_url: str,
        ready_path: str,
        timeout_s: float = 900.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.base_url = base_url
        self.startup_s = 0.0  # from the start of the process to the first 200
        self._command = list(command)
        self._ready_url = base_url + ready_path
        self._timeout_s = timeout_s
        self._env = None if env is None else dict(env)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "inside the context manager only"
        return self._process.pid

    def __enter__(self) -> Self:
        start_s = time.perf_counter()
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit_at_signal)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._env,
            start_new_session=True,  # Ctrl-C is for us, who end it in order
        )
        try:
            while not _is_ready(self._ready_url):
                self._check_start(time.perf_counter() - start_s)
                time.sleep(_POLL_S)
        except BaseException:
            self._stop()
            raise
        self.startup_s = time.perf_counter() - start_s
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _check_start(self, elapsed_s: float) -> None:
        assert self._process is not None
        status = self._process.poll()
        if status is None and elapsed_s < self._timeout_s:
            return
        what = f"is not ready after {elapsed_s:.0f} s"
        if status is not None:
            what = f"ended with status {status} before it was ready"
        raise EngineDeadError(f"The server {what}. Its last output:\n{self._last_output()}")

    def _last_output(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_NUM_SHOWN_LINES:])

    def _stop(self) -> None:
        """Asks the server; then ends all that is left of it."""
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # its session: workers that it left behind
        process.wait()
        self._log.close()


def _exit_at_signal(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class JaxInferServer(ServerProcess):
    """`jaxinfer serve` of this installation with the settings of `config`, on a free port."""

    def __init__(self, config: ServeConfig) -> None:
        port = free_port()
        settings = flatten(config) | {"host": "127.0.0.1", "port": port}
        self._directory = tempfile.TemporaryDirectory(prefix="jaxinfer-bench-")
        path = Path(self._directory.name) / "serve.yaml"
        given = {name: value for name, value in settings.items() if value not in (None, [], {})}
        path.write_text(yaml.safe_dump(given), encoding="utf-8")
        command = [sys.executable, "-m", "jaxinfer.cli.main", "serve", "--config", str(path)]
        super().__init__(command, base_url=f"http://127.0.0.1:{port}", ready_path="/ready")

    def _stop(self) -> None:
        super()._stop()
        self._directory.cleanup()


def check_base_url(base_url: str) -> str:
    """The URL as routes are appended to it. Raises ConfigError for what is none."""
    url = base_url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")) or url.endswith(":/"):
        raise ConfigError(
            f"--base-url={base_url!r} must be like http://127.0.0.1:8000, without /v1."
        )
    return url
