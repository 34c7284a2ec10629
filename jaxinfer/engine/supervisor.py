"""Keeps an engine core running: notices that it has died or stalled, and starts another one.

A SupervisedClient is an EngineClient over one core process after another. When a core is lost, its
reader learns it at once (CoreLost), and again when the next one serves (CoreBack); requests are not
carried over, since nobody knows which of them did the harm. Totals go on from core to core.
Knows clients and time; must not know requests' contents, HTTP or how a core is spawned.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from jaxinfer.core.messages import (
    AddRequest,
    CoreMessage,
    EngineInfo,
    EngineStats,
    Failed,
    Rejected,
    StepUpdate,
)
from jaxinfer.core.progress import ProgressCallback, ignore_progress
from jaxinfer.engine.client import ProcessClient
from jaxinfer.engine.events import CoreBack, CoreLost, SupervisionEvent
from jaxinfer.errors import EngineDeadError, JaxInferError
from jaxinfer.logging import get_logger

logger = get_logger(__name__)

_LONGEST_TICK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class SupervisionPolicy:
    """When a core counts as lost, and how often another one is tried."""

    stall_timeout_s: float = 120.0  # requests run and no step ends for so long; 0: never
    silent_start_s: float = 900.0  # a restart that reports no progress for so long has failed
    max_restarts: int | None = 3  # within `window_s`; one more loss ends the engine. None: no end
    window_s: float = 600.0
    first_delay_s: float = 1.0  # before the second restart in a window; doubles from there
    longest_delay_s: float = 30.0

    def delay_s(self, num_recent: int) -> float:
        """The wait before a restart, after `num_recent` others in the window."""
        if num_recent == 0:
            return 0.0
        return min(self.longest_delay_s, self.first_delay_s * 2 ** (num_recent - 1))


class SupervisedClient:
    """An EngineClient that outlives its cores. All methods are for one event loop.

    `make_client` makes a client that has not started; `on_progress` hears what is done between two
    cores. A first start that fails is the caller's
    business, as with the client itself; from then on failures count against the policy.
    """

    def __init__(
        self,
        make_client: Callable[[], ProcessClient],
        policy: SupervisionPolicy,
        *,
        on_progress: ProgressCallback = ignore_progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_client = make_client
        self._policy = policy
        self._on_progress = on_progress
        self._clock = clock
        self._client = make_client()
        self._open: set[str] = set()  # requests that the core owes an answer
        self._owes_abort = False  # and it answers every abort, so that one left alone is noticed
        self._silent_s = 0.0  # how long it has owed one without ending a step
        self._totals = EngineStats()  # of the cores before this one
        self._shown = EngineStats()
        self._restart_times_s: deque[float] = deque()
        self._is_down = False
        self._halt = asyncio.Event()  # no restart any more
        self._watch: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    @property
    def pid(self) -> int | None:
        """The process id of the core that runs or starts."""
        return self._client.pid

    @property
    def is_alive(self) -> bool:
        """A core serves, or will again."""
        return self._client.is_alive or (self._is_down and not self._halt.is_set())

    async def start(self) -> EngineInfo:
        info = await self._client.start()
        if self._policy.stall_timeout_s > 0:
            self._watch = asyncio.create_task(self._watch_for_stalls(), name="stall-watch")
        return info

    async def add(self, request: AddRequest) -> None:
        if self._is_down:
            raise EngineDeadError("The engine core is being restarted.")
        await self._client.add(request)
        self._open.add(request.request_id)

    async def abort(self, request_ids: list[str]) -> None:
        self._open.difference_update(request_ids)
        if not self._is_down:
            self._owes_abort = True
            await self._client.abort(request_ids)

    async def reset_prefix_cache(self) -> None:
        await self._client.reset_prefix_cache()

    async def messages(self) -> AsyncIterator[CoreMessage | SupervisionEvent]:
        while True:
            failed: Failed | None = None
            async for message in self._client.messages():
                if isinstance(message, Failed):
                    failed = message
                else:
                    yield self._take(message)
            if failed is None:  # closed
                return
            if self._policy.max_restarts == 0 or self._halt.is_set():
                yield failed
                return
            yield self._lose(failed)
            end = await self._restart(failed)
            if end is not None:
                yield end
                return
            yield self._return()

    def stop_restarting(self) -> None:
        """A core that is lost from now on stays lost, and one that is being restarted too."""
        self._halt.set()

    async def close(self) -> None:
        self._halt.set()
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        await self._client.close()

    # What the core says.

    def _take(self, message: CoreMessage) -> CoreMessage:
        match message:
            case StepUpdate():
                self._silent_s = 0.0
                self._owes_abort = False
                for news in message.sequences:
                    if news.finish_reason is not None:
                        self._open.discard(news.request_id)
                if self._totals.num_restarts_total:
                    stats = _with_totals(message.stats, self._totals)
                    message = msgspec.structs.replace(message, stats=stats)
                self._shown = message.stats
            case Rejected():
                self._open.discard(message.request_id)
        return message

    async def _watch_for_stalls(self) -> None:
        """Counts ticks, not the clock: time in which this process itself did not run (a busy loop,
        a suspended machine) says nothing about the core."""
        limit_s = self._policy.stall_timeout_s
        tick_s = min(_LONGEST_TICK_S, limit_s / 8)
        while True:
            before_s = self._clock()
            await asyncio.sleep(tick_s)
            if self._is_down or not (self._open or self._owes_abort):
                self._silent_s = 0.0
                continue
            self._silent_s += min(self._clock() - before_s, 2 * tick_s)
            if self._silent_s >= limit_s:
                reason = f"The engine core has stalled: no step ended for {limit_s:g} s"
                logger.error("%s while %d sequences are open", reason, len(self._open))
                self._client.give_up(f"{reason}.")

    # Losing a core and starting the next.

    def _lose(self, failed: Failed) -> CoreLost:
        self._is_down = True
        self._on_progress("end the lost engine", 0, 0)
        self._open.clear()
        self._owes_abort = False
        self._shown = msgspec.structs.replace(
            self._shown, num_running=0, num_waiting=0, kv_usage=0.0
        )
        self._totals = self._shown
        reason = failed.message.partition("\n")[0]
        return CoreLost(reason=f"{reason} It is being restarted.", stats=self._shown)

    def _return(self) -> CoreBack:
        self._is_down = False
        self._silent_s = 0.0
        self._shown = self._totals
        return CoreBack(info=self._client.info, stats=self._shown)

    async def _restart(self, failed: Failed) -> Failed | None:
        """Tries until a core serves (None); Failed when it may not be tried again."""
        while True:
            await self._client.close()
            delay_s = None if self._halt.is_set() else self._next_delay_s()
            if delay_s is None:
                return failed if self._halt.is_set() else self._give_up(failed)
            logger.warning("the engine core is restarted in %.0f s", delay_s)
            self._on_progress("wait to restart the engine", 0, 0)
            if await self._halted_within(delay_s):
                return failed
            start_s = self._clock()
            self._client = self._make_client()
            num_restarts = self._totals.num_restarts_total + 1
            self._totals = msgspec.structs.replace(self._totals, num_restarts_total=num_restarts)
            try:
                await self._start_unless_halted()
            except JaxInferError as error:
                if not self._halt.is_set():
                    logger.error("the engine core could not be restarted: %s", error)
                failed = Failed(kind=type(error).__name__, message=str(error))
            else:
                seconds = self._clock() - start_s
                logger.info("the engine core is back after %.1f s", seconds)
                return None

    def _next_delay_s(self) -> float | None:
        """Takes a restart from the budget; None when it is used up."""
        now_s = self._clock()
        times_s = self._restart_times_s
        while times_s and now_s - times_s[0] > self._policy.window_s:
            times_s.popleft()
        most = self._policy.max_restarts
        if most is not None and len(times_s) >= most:
            return None
        delay_s = self._policy.delay_s(len(times_s))
        times_s.append(now_s)
        return delay_s

    def _give_up(self, failed: Failed) -> Failed:
        policy = self._policy
        reason = (
            f"The engine core was lost again after {policy.max_restarts} restarts within "
            f"{policy.window_s:g} s, so it is given up. The last reason: {failed.message}"
        )
        return Failed(kind=EngineDeadError.__name__, message=reason)

    async def _halted_within(self, timeout_s: float) -> bool:
        if timeout_s > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._halt.wait(), timeout_s)
        return self._halt.is_set()

    async def _start_unless_halted(self) -> None:
        limit_s = self._policy.silent_start_s
        reason = f"The engine core has stalled: its start showed no progress for {limit_s:g} s."
        start = asyncio.ensure_future(self._client.start())
        halt = asyncio.ensure_future(self._halt.wait())
        tick_s = min(_LONGEST_TICK_S, limit_s / 8)
        try:
            while not (start.done() or halt.done()):
                await asyncio.wait({start, halt}, timeout=tick_s, return_when="FIRST_COMPLETED")
                if self._client.silent_s > limit_s:  # `start` raises this
                    self._client.give_up(reason)
            if not start.done():
                await self._client.close()  # which ends the start, with an error
            await start
        finally:
            halt.cancel()
            if not start.done():  # we were cancelled
                start.cancel()
            await asyncio.gather(start, halt, return_exceptions=True)


def _with_totals(stats: EngineStats, totals: EngineStats) -> EngineStats:
    """`stats` of this core, its totals added to those of the cores before it."""
    return msgspec.structs.replace(
        stats,
        **{
            name: getattr(stats, name) + getattr(totals, name)
            for name in EngineStats.__struct_fields__
            if name.endswith("_total") or name == "num_compiles_after_ready"
        },
    )
