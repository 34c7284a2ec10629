"""`run_server`: the life of the HTTP process, from the socket to the last answer.

The socket is bound before anything is loaded, so a port in use is known at once and /health and
/ready answer while the engine loads. Knows the order of things; not what they do. Imports no JAX.
"""

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from jaxinfer.config.schema import EngineConfig, ServeConfig
from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.engine.build import DEFAULT_RUNNER_FACTORY
from jaxinfer.engine.launch import supervised_core
from jaxinfer.engine.model_source import LoadedModel, load_model_tokenizer, sampling_defaults
from jaxinfer.engine.supervisor import SupervisedClient, SupervisionPolicy
from jaxinfer.errors import ConfigError
from jaxinfer.logging import get_logger
from jaxinfer.server.app import create_app_around, make_runner
from jaxinfer.server.connections import SILENT_TIMEOUT_S
from jaxinfer.server.startup import StartupLog
from jaxinfer.server.state import ServerState

logger = get_logger(__name__)

UNREAD_TIMEOUT_S = 120.0
_BACKLOG = 2048

_T = TypeVar("_T")


def run_server(config: ServeConfig, *, runner_factory: str = DEFAULT_RUNNER_FACTORY) -> None:
    """Serves until SIGINT or SIGTERM; then returns, with no process left behind.

    Raises ConfigError for an address that cannot be bound, what kept the engine from starting, and
    EngineDeadError when the engine was lost too often to be restarted.
    """
    with bind(config.server.host, config.server.port) as listener:
        asyncio.run(_Server(config, listener, runner_factory).serve())


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises ConfigError that names what to change."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError(f"--host={host!r} is not an address of this machine: {error}.") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _limit_unread(listener, UNREAD_TIMEOUT_S)
        listener.bind(address)
        # Bound is not yet taken: another process could still bind and listen first.
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_bind_problem(error, host, port)) from error
    return listener


def _limit_unread(listener: socket.socket, timeout_s: float) -> None:
    """Connections end when the client takes nothing of what was sent for so long.

    (RFC 5482's user timeout, which accepted sockets inherit. The kernel's business: a timer for
    each frame of each stream would cost the event loop more than all its other work on them.)
    """
    if sys.platform == "linux":
        milliseconds = int(timeout_s * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _bind_problem(error: OSError, host: str, port: int) -> str:
    match error.errno:
        case errno.EADDRNOTAVAIL:
            return (
                f"--host={host!r} is not an address of this machine. Use 127.0.0.1 for clients on "
                "this machine only, or 0.0.0.0 for all."
            )
        case errno.EACCES:
            repair = "Choose a port from 1024 up (0 picks a free one)."
        case _:
            repair = "Choose another port (0 picks a free one) or stop what uses it."
    return f"--port={port}: cannot listen on {host}:{port} ({error.strerror}). {repair}"


class _Server:
    """One run: start, serve, drain, stop."""

    def __init__(self, config: ServeConfig, listener: socket.socket, runner_factory: str) -> None:
        self._config = config
        self._listener = listener
        self._runner_factory = runner_factory
        self._state = ServerState(config.server)
        self._stop = asyncio.Event()  # the first signal
        self._hurry = asyncio.Event()  # the second
        self._engine: AsyncEngine | None = None
        self._client: SupervisedClient | None = None
        self._progress = StartupLog(self._set_phase)

    def _set_phase(self, phase: str) -> None:
        self._state.phase = phase

    def _is_ready(self) -> bool:
        return self._engine is not None and self._engine.is_ready

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        runner = make_runner(create_app_around(self._state))
        await runner.setup()
        site = web.SockSite(runner, self._listener, backlog=_BACKLOG)
        await site.start()
        logger.info("listening on %s; the engine is starting", self._url)
        background = [
            asyncio.create_task(self._state.connections.close_silent(runner, SILENT_TIMEOUT_S)),
            asyncio.create_task(self._progress.watch(self._is_ready)),
        ]
        try:
            if await self._start_engine_unless_stopped():
                logger.info("ready: %s/v1", self._url)
                await self._stopped_or_dead()
                await self._drain()
        finally:
            # First the engine, so that open requests end with an error instead of silence.
            if self._engine is not None:
                await self._engine.close()
            await site.stop()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await runner.cleanup()
            logger.info("stopped")

    @property
    def _url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        logger.info("shutting down")
        self._state.is_draining = True
        if self._client is not None:
            self._client.stop_restarting()
        self._stop.set()

    async def _start_engine_unless_stopped(self) -> bool:
        """False if a signal came first. Raises what kept the engine from starting."""
        start = asyncio.create_task(self._start_engine())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                await start
            return not self._stop.is_set()
        finally:
            for task in (start, stop):
                task.cancel()
            await asyncio.gather(start, stop, return_exceptions=True)

    async def _start_engine(self) -> None:
        began_s = time.monotonic()
        config, progress = self._config, self._progress
        model = await _in_thread(lambda: _load(config.engine, progress))
        defaults = sampling_defaults(model.tokenizer, config.engine.model)
        self._client = supervised_core(
            config.engine,
            SupervisionPolicy(
                stall_timeout_s=config.server.engine_stall_timeout,
                max_restarts=config.server.engine_max_restarts,
            ),
            on_progress=progress,
            runner_factory=self._runner_factory,
            log_level=config.server.log_level,
        )
        engine = AsyncEngine(self._client, model.tokenizer, model.name)
        self._engine = engine
        await engine.start()
        self._state.attach(
            engine,
            sampling_defaults=defaults,
            max_num_queued=config.engine.scheduler.max_num_queued_reqs,
        )
        logger.info("start-up took %.1f s", time.monotonic() - began_s)

    async def _stopped_or_dead(self) -> None:
        """Returns at a signal; raises what the engine died of when it will not be restarted."""
        assert self._engine is not None
        stop = asyncio.create_task(self._stop.wait())
        death = asyncio.create_task(self._engine.wait_dead())
        try:
            await asyncio.wait({stop, death}, return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                raise death.result()
        finally:
            stop.cancel()
            death.cancel()

    async def _drain(self) -> None:
        """Running requests get --shutdown-timeout to end, or until the next signal.

        New ones get 503 meanwhile: the socket stays open, so that nobody is left to guess.
        """
        hurry = asyncio.create_task(self._hurry.wait())
        idle = asyncio.create_task(self._state.wait_idle())
        timeout_s = self._config.server.shutdown_timeout
        await asyncio.wait({hurry, idle}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (hurry, idle):
            task.cancel()
        await asyncio.gather(hurry, idle, return_exceptions=True)


def _load(config: EngineConfig, progress: StartupLog) -> LoadedModel:
    progress("locate model", 0, 0)
    return load_model_tokenizer(config, progress)


async def _in_thread(work: Callable[[], _T]) -> _T:
    """`work` in a daemon thread: unlike a pool's, it does not hold up the exit (a download may)."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(outcome: Callable[[], None]) -> None:
        if not done.done():
            outcome()

    def call() -> None:
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - raised again by the awaiting task
            failure = error
            outcome = lambda: done.set_exception(failure)
        else:
            outcome = lambda: done.set_result(value)
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=call, name="load", daemon=True).start()
    return await done
