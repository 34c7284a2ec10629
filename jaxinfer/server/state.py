"""What the handlers share: the engine once it is there, and what is in flight.

The HTTP server answers before the engine does, so the engine is attached later. Knows no routes.
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from aiohttp import web

from jaxinfer import __version__
from jaxinfer.config.schema import SchedulerConfig, ServerConfig
from jaxinfer.core.messages import EngineInfo
from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.errors import ModelNotFoundError
from jaxinfer.server.connections import ConnectionWatch
from jaxinfer.server.errors import unavailable
from jaxinfer.server.metrics import Metrics
from jaxinfer.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Serving:
    """An engine that is ready, and what the API says of it."""

    engine: AsyncEngine
    model_names: tuple[str, ...]  # the first is the canonical one
    sampling_defaults: Mapping[str, Any]
    max_num_queued: int  # sequences that may wait in the engine
    created_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: same value, same program and model."""
        info = self.info
        what = f"{info.model}|{info.dtype}|{info.device}|{info.max_model_len}|{info.page_size}"
        return f"jaxinfer-{__version__}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"

    @cached_property
    def longest_token_bytes(self) -> int:
        """Bounds how few tokens a text can be. Costs milliseconds: not for the event loop."""
        return max(len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size))

    def check_model(self, name: str | None) -> str:
        """The name to show in the answer. Raises ModelNotFoundError; none given is the model."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            names = ", ".join(f"`{known}`" for known in self.model_names)
            raise ModelNotFoundError(f"The model `{name}` does not exist. Served here: {names}.")
        return name


class ServerState:
    """Mutable state of the server process; lives on the event loop's thread only."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.connections = ConnectionWatch()
        self.phase = "starting"
        self.is_draining = False
        self.num_inflight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._serving: Serving | None = None

    def attach(
        self,
        engine: AsyncEngine,
        *,
        sampling_defaults: Mapping[str, Any] | None = None,
        max_num_queued: int = SchedulerConfig.max_num_queued_reqs,
    ) -> None:
        """From now on requests are served by `engine`, which has started.

        `sampling_defaults` are for requests that say nothing; None means the model's own.
        `max_num_queued` is the engine's limit: a larger request would be refused for ever.
        """
        names = tuple(self.config.served_model_name) or (engine.model_name,)
        metrics = self.metrics.engine(
            prefix=self.config.metrics_prefix,
            model_name=names[0],
            info=engine.info,
            stats=lambda: engine.stats,
        )
        engine.observe(
            on_tokens=metrics.on_tokens,
            on_finished=metrics.on_finished,
            on_step=metrics.on_step,
        )
        if sampling_defaults is None:
            sampling_defaults = engine.tokenizer.sampling_defaults()
        self._serving = Serving(
            engine=engine,
            model_names=names,
            sampling_defaults=sampling_defaults,
            max_num_queued=max_num_queued,
        )
        self.phase = "ready"

    @property
    def serving(self) -> Serving:
        """Raises ApiError 503 while there is no engine to serve with."""
        if self._serving is None:
            raise unavailable(f"The engine is not ready yet (phase: {self.phase}).")
        if self.is_draining:
            raise unavailable("The server is shutting down.")
        return self._serving

    def begin(self) -> None:
        self._idle.clear()
        self.num_inflight += 1

    def end(self) -> None:
        self.num_inflight -= 1
        if self.num_inflight == 0:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Returns when nothing is generated."""
        await self._idle.wait()

    def not_ready(self) -> str | None:
        """Why /ready is not 200."""
        if self._serving is None:
            return f"starting: {self.phase}"
        if self.is_draining:
            return "shutting down"
        problem = self.not_alive()
        if problem is None and not self._serving.engine.is_ready:
            return "the engine is not ready"
        return problem

    def not_alive(self) -> str | None:
        """Why /health is not 200: the engine is gone or being restarted, or works on requests and
        takes no steps. (A server that starts is alive.)"""
        if self._serving is None:
            return None
        engine = self._serving.engine
        if engine.outage is not None:
            return f"{engine.outage} ({self.phase})"
        if not engine.is_alive:
            return "the engine process is gone"
        # (Of the engine's open requests: a client that does not read its answer is no stall.)
        silent_s, limit_s = engine.silent_s, self.config.engine_stall_timeout
        if 0 < limit_s < silent_s:
            return f"requests are running and no step has ended for {silent_s:.0f} s"
        return None


STATE = web.AppKey("STATE", ServerState)
