"""The engine core as a child process: what runs in the child, and how it is told what to run.

The parent writes one length-prefixed JSON `Bootstrap` to the child's stdin and keeps the pipe
open: its end-of-file means that the parent is gone, however it went. JAX is imported only after
the child has greeted its clients, so a client learns at once that the process lives.
"""

import ctypes
import faulthandler
import gc
import os
import signal
import struct
import sys
import threading
import time
from typing import BinaryIO

import msgspec

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.messages import WIRE_VERSION, Failed, Hello, Progress, Ready
from jaxinfer.core.progress import ProgressCallback
from jaxinfer.engine.build import build_core
from jaxinfer.engine.child import STACKS_SIGNAL
from jaxinfer.engine.transport import ClientAddress, CoreEndpoint
from jaxinfer.errors import CapacityError, UserError
from jaxinfer.logging import configure_logging, get_logger

logger = get_logger(__name__)

_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """All that a core process must know at its start."""

    config: EngineConfig
    clients: list[ClientAddress]
    core_index: int
    runner_factory: str
    parent_pid: int
    dies_with_parent_thread: bool  # the thread that spawned it ends no sooner than the parent
    log_level: str


def child_command() -> list[str]:
    """The command line of a core process that imports exactly what this process can import.

    A subprocess and not multiprocessing: scripts that use `LLM` or `AsyncEngine` need no
    `if __name__ == "__main__"` guard. -P keeps the working directory from shadowing modules.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from jaxinfer.engine.process import main; sys.exit(main())"
    )
    return [sys.executable, "-P", "-c", code]


def write_bootstrap(pipe: BinaryIO, bootstrap: Bootstrap) -> None:
    payload = msgspec.json.encode(bootstrap)
    pipe.write(_LENGTH.pack(len(payload)) + payload)
    pipe.flush()


def read_bootstrap(fd: int) -> Bootstrap:
    (length,) = _LENGTH.unpack(_read_exactly(fd, _LENGTH.size))
    return msgspec.json.decode(_read_exactly(fd, length), type=Bootstrap)


def _read_exactly(fd: int, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = os.read(fd, num_bytes - len(data))
        if not part:
            raise EOFError("the parent closed the pipe before it said what to run")
        data += part
    return data


def main() -> int:
    """Runs one engine core until it is told to end; the exit status of the process."""
    # The descriptor and not sys.stdin, whose lock the watching thread would still hold when the
    # interpreter ends.
    lifeline_fd = 0
    bootstrap = read_bootstrap(lifeline_fd)
    configure_logging(bootstrap.log_level, process="core")
    _tie_to_parent(bootstrap, lifeline_fd)
    # Ctrl-C is for the parent, which ends the core in order. SIGTERM keeps its default, sudden
    # end: there is nothing to save, and it must work in the middle of a long compilation.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # In C and without Python's lock, so a thread that hangs in the runtime shows where.
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    endpoint = CoreEndpoint(bootstrap.clients, core_index=bootstrap.core_index)
    endpoint.start(Hello(wire_version=WIRE_VERSION, pid=os.getpid()))
    progress = _progress_sender(endpoint)
    progress("start the engine", 0, 0)  # tells the client that the second socket is connected too
    try:
        _run(bootstrap, endpoint, progress)
    except Exception as error:  # noqa: BLE001 - the process boundary: every end must be told
        if isinstance(error, UserError | CapacityError):
            logger.debug("the engine cannot start: %s", error)  # who started us tells the user
        else:
            logger.exception("the engine core failed")
        endpoint.broadcast(Failed(kind=type(error).__name__, message=str(error)))
        endpoint.close()
        return 1
    endpoint.close()
    return 0


def _run(bootstrap: Bootstrap, endpoint: CoreEndpoint, progress: ProgressCallback) -> None:
    """Builds the core and serves until Shutdown."""
    built = build_core(
        bootstrap.config,
        runner_factory=bootstrap.runner_factory,
        progress=progress,
        send=endpoint.send,
        num_clients=endpoint.num_clients,
    )
    # What was made while starting lives as long as the process: collections need not visit it.
    gc.collect()
    gc.freeze()
    endpoint.broadcast(Ready(info=built.info))
    try:
        built.core.serve(endpoint.inbox)
    finally:
        built.runner.close()


def _progress_sender(endpoint: CoreEndpoint) -> ProgressCallback:
    start_s = time.monotonic()

    def report(phase: str, done: int, total: int) -> None:
        elapsed_s = time.monotonic() - start_s
        endpoint.broadcast(Progress(phase=phase, done=done, total=total, elapsed_s=elapsed_s))

    return report


def _tie_to_parent(bootstrap: Bootstrap, lifeline_fd: int) -> None:
    """Makes this process end when its parent does, even by kill -9.

    The pipe works everywhere. On Linux the kernel also kills the child, even if Python is stuck;
    but it takes the death of the parent's *thread* for that of the parent, so this is used only
    when the main thread spawned us.
    """
    watch = threading.Thread(
        target=_watch_lifeline, args=(lifeline_fd,), name="lifeline", daemon=True
    )
    watch.start()
    if sys.platform == "linux" and bootstrap.dies_with_parent_thread:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != bootstrap.parent_pid:  # it died before the call
            os._exit(1)


def _watch_lifeline(lifeline_fd: int) -> None:
    while os.read(lifeline_fd, 1):
        pass
    os._exit(1)  # nobody is left to answer to


if __name__ == "__main__":
    sys.exit(main())
