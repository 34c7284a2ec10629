"""The client side of an engine core: spawns the core process, talks to it, watches it.

Lives in the HTTP process: imports no JAX. Knows messages and the process; must not know requests,
text or HTTP. Messages are read on the event loop straight from the socket's descriptor: measured
against zmq.asyncio (futures and timers for each message) that saves some 50 us of CPU per message,
and against a reader thread (which must get the GIL from a busy loop first) a third of the latency.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

from jaxinfer import errors
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.messages import (
    AbortRequests,
    AddRequest,
    ClientMessage,
    CoreMessage,
    EngineInfo,
    Failed,
    Progress,
    Ready,
    ResetPrefixCache,
    Shutdown,
)
from jaxinfer.core.progress import ProgressCallback, ignore_progress
from jaxinfer.engine.build import DEFAULT_RUNNER_FACTORY
from jaxinfer.engine.child import ChildProcess
from jaxinfer.engine.events import SupervisionEvent
from jaxinfer.engine.process import Bootstrap, child_command, write_bootstrap
from jaxinfer.engine.transport import ClientEndpoint
from jaxinfer.errors import EngineDeadError, JaxInferError
from jaxinfer.logging import get_logger

logger = get_logger(__name__)

_CORE_INDEX = 0
_DRAIN_S = 0.05  # what a core said with its last breath may still be in the socket
_SHUTDOWN_S = 10.0
_TERMINATE_S = 3.0
_STACKS_S = 0.5  # for the stacks of a stalled core to get into the log


class EngineClient(Protocol):
    """How an AsyncEngine reaches an engine core."""

    @property
    def info(self) -> EngineInfo:
        """Known once `start` has returned."""
        ...

    @property
    def is_alive(self) -> bool: ...

    async def start(self) -> EngineInfo:
        """Returns when the core serves; raises what kept it from starting."""
        ...

    async def add(self, request: AddRequest) -> None:
        """Raises EngineDeadError."""
        ...

    async def abort(self, request_ids: list[str]) -> None: ...

    async def reset_prefix_cache(self) -> None: ...

    def messages(self) -> AsyncIterator[CoreMessage | SupervisionEvent]:
        """What the core sends after Ready, for one reader; ends with Failed, or at `close`."""
        ...

    async def close(self) -> None:
        """Ends the core in order, by force if need be. Idempotent."""
        ...


class ProcessClient:
    """An EngineClient whose core is a child process.

    All methods are for one event loop. `on_progress(phase, done, total)` is called on it.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: ProgressCallback = ignore_progress,
        runner_factory: str = DEFAULT_RUNNER_FACTORY,
        log_level: str = "info",
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._runner_factory = runner_factory
        self._log_level = log_level
        self._endpoint: ClientEndpoint | None = None
        self._child: ChildProcess | None = None
        self._info: EngineInfo | None = None
        self._failure: Failed | None = None
        self._closing = False
        self._is_stalled = False
        self._received: deque[CoreMessage] = deque()
        self._news = asyncio.Event()  # something was received, or the end has come
        self._exited = asyncio.Event()
        self._last_message_time_s = time.monotonic()

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "the engine has not started"
        return self._info

    @property
    def pid(self) -> int | None:
        """The core's process id."""
        return None if self._child is None else self._child.pid

    @property
    def silent_s(self) -> float:
        """How long the core has said nothing."""
        return time.monotonic() - self._last_message_time_s

    @property
    def is_alive(self) -> bool:
        return (
            self._child is not None
            and not self._exited.is_set()
            and self._failure is None
            and not self._closing
        )

    async def start(self) -> EngineInfo:
        """Spawns the core and waits until it is ready.

        Raises the core's own ConfigError, CheckpointError, CapacityError ..., or EngineDeadError
        when it died without one. The child is gone then, also if this is cancelled.
        """
        assert self._child is None, "start() is for once"
        try:
            self._spawn()
            await self._wait_for_hello()
            self._info = await self._wait_for_ready()
        except BaseException:
            await self.close()
            raise
        return self._info

    async def add(self, request: AddRequest) -> None:
        if not self.is_alive:
            raise self._death()
        self._send(request)

    async def abort(self, request_ids: list[str]) -> None:
        with suppress(EngineDeadError):  # then they have ended anyway
            self._send(AbortRequests(request_ids=request_ids))

    async def reset_prefix_cache(self) -> None:
        self._send(ResetPrefixCache())

    async def messages(self) -> AsyncIterator[CoreMessage]:
        while True:
            while self._received:
                yield self._received.popleft()
            if self._closing or self._failure is not None:
                return
            self._news.clear()
            await self._news.wait()

    def give_up(self, reason: str) -> None:
        """Takes a core that answers no more for dead: `messages` ends with Failed.

        `close` then writes the core's stacks to the log before it ends the core by force.
        """
        if self.is_alive:
            self._is_stalled = True
            self._failure = Failed(kind=EngineDeadError.__name__, message=reason)
            self._received.append(self._failure)
            self._news.set()

    async def close(self) -> None:
        if self._closing:
            await self._exited.wait()
            return
        self._closing = True
        self._news.set()
        if self._child is None:
            self._exited.set()
        else:
            await self._end_child(self._child)
        if self._endpoint is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._endpoint.messages_fd)
            loop.remove_reader(self._endpoint.hello_fd)
            self._endpoint.close()
            self._endpoint = None

    def _spawn(self) -> None:
        loop = asyncio.get_running_loop()
        self._endpoint = ClientEndpoint()
        loop.add_reader(self._endpoint.messages_fd, self._receive)
        self._child = ChildProcess(
            child_command(), name="core", on_exit=_on_loop(loop, self._child_exited)
        )
        bootstrap = Bootstrap(
            config=self._config,
            clients=[self._endpoint.address],
            core_index=_CORE_INDEX,
            runner_factory=self._runner_factory,
            parent_pid=os.getpid(),
            dies_with_parent_thread=threading.current_thread() is threading.main_thread(),
            log_level=self._log_level,
        )
        with suppress(BrokenPipeError):  # it is dead already: the wait for its hello tells why
            write_bootstrap(self._child.stdin, bootstrap)

    async def _wait_for_hello(self) -> None:
        assert self._endpoint is not None
        loop = asyncio.get_running_loop()
        loop.add_reader(self._endpoint.hello_fd, self._news.set)
        while True:
            if self._closing or self._failure is not None:
                raise self._death()
            if self._endpoint.receive_hello() is not None:
                break
            self._news.clear()
            await self._news.wait()
        loop.remove_reader(self._endpoint.hello_fd)

    async def _wait_for_ready(self) -> EngineInfo:
        async for message in self.messages():
            if self._endpoint is not None:  # both its sockets are connected now
                self._endpoint.remove_files()
            match message:
                case Progress():
                    self._on_progress(message.phase, message.done, message.total)
                case Ready():
                    return message.info
                case Failed():
                    raise self._death()
                case _:
                    logger.warning("a core that is starting sent %s", type(message).__name__)
        raise self._death()

    def _send(self, message: ClientMessage) -> None:
        if self._endpoint is None:
            raise self._death()
        self._endpoint.send(_CORE_INDEX, message)

    def _receive(self) -> None:
        """The descriptor is readable: take over everything, then wake the reader."""
        if self._endpoint is None:
            return
        messages = self._endpoint.receive()
        if not messages:
            return
        self._last_message_time_s = time.monotonic()
        for message in messages:
            if isinstance(message, Failed):
                self._failure = message
        self._received.extend(messages)
        self._news.set()

    def _child_exited(self) -> None:
        self._exited.set()
        self._news.set()
        if not self._closing:
            asyncio.get_running_loop().call_later(_DRAIN_S, self._declare_dead)

    def _declare_dead(self) -> None:
        """The core is gone: takes its last words, or speaks them for it."""
        self._receive()
        if self._failure is None and not self._closing:
            assert self._child is not None
            code = self._child.exit_code
            how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
            logger.error("the engine core ended %s", how)
            # (The log has the output too, but whoever embeds the engine sees the exception.)
            tail = "\n".join(self._child.last_lines)
            message = f"The engine core ended {how}.\nIts last output:\n{tail}"
            self._failure = Failed(kind=EngineDeadError.__name__, message=message)
            self._received.append(self._failure)
        self._news.set()

    def _death(self) -> JaxInferError:
        if self._failure is None:
            is_over = self._closing or not self._exited.is_set()
            what = "is stopped" if is_over else "core has ended"
            return EngineDeadError(f"The engine {what}.")
        return error_from(self._failure)

    async def _end_child(self, child: ChildProcess) -> None:
        """Asks, then terminates, then kills."""
        if self._is_stalled and not self._exited.is_set():
            child.dump_stacks()
            await self._exits_within(_STACKS_S)
        if self._info is not None and self._failure is None:
            with suppress(EngineDeadError):
                self._send(Shutdown())
            await self._exits_within(_SHUTDOWN_S)
        if not self._exited.is_set():
            child.terminate()
            await self._exits_within(_TERMINATE_S)
        if not self._exited.is_set():
            logger.warning("the engine core did not end when asked; it is killed")
            child.kill()
            await self._exited.wait()
        child.close_stdin()
        child.join(timeout_s=1.0)

    async def _exits_within(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._exited.wait(), timeout_s)


def error_from(failed: Failed) -> JaxInferError:
    """What a core ended with: users' errors keep their class, all else is EngineDeadError."""
    by_name = {
        kind.__name__: kind
        for kind in (
            errors.ConfigError,
            errors.CheckpointError,
            errors.ModelNotFoundError,
            errors.CapacityError,
        )
    }
    if failed.kind in by_name:
        return by_name[failed.kind](failed.message)
    if failed.kind == EngineDeadError.__name__:
        return EngineDeadError(failed.message)
    return EngineDeadError(f"The engine core failed: {failed.kind}: {failed.message}")


def _on_loop(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> Callable[[], None]:
    """`callback` to be called from another thread; nothing once the loop has ended."""

    def call() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            loop.call_soon_threadsafe(callback)

    return call
