"""EngineCore: the one place that joins scheduler and runner.

It turns client messages into requests, keeps up to two steps on the device, and sends what each
step brought. Knows the contracts of scheduler and runner; must not know sockets, processes, text
or JAX (the runner is behind a Protocol), so that the same core runs in its own process and inside
`LLM`.
"""

import queue
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.messages import (
    AbortRequests,
    AddRequest,
    ClientMessage,
    CoreMessage,
    EngineInfo,
    EngineStats,
    Rejected,
    ResetPrefixCache,
    SequenceUpdate,
    Shutdown,
    StepUpdate,
)
from jaxinfer.core.request import FinishReason
from jaxinfer.core.step import ScheduledStep, StepOutput
from jaxinfer.engine.admission import make_request
from jaxinfer.engine.recovery import Recovery, StepFailedError
from jaxinfer.engine.transport import Incoming
from jaxinfer.errors import QueueFullError, RequestError
from jaxinfer.scheduler.scheduler import Scheduler


class PendingStep(Protocol):
    """A step that runs on the device."""

    def result(self) -> StepOutput:
        """Blocks until the step has ended."""
        ...


class Runner(Protocol):
    """What the core needs of a runner."""

    @property
    def limits(self) -> EngineLimits: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def device_name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def num_compiles_after_ready(self) -> int: ...

    def dispatch(self, step: ScheduledStep) -> PendingStep:
        """Puts a step on the device; returns at once."""
        ...

    def reset(self) -> None:
        """Forgets all sequences and steps; after a step that failed it works again."""
        ...

    def close(self) -> None: ...


class InFlight(NamedTuple):
    step: ScheduledStep
    pending: PendingStep


class EngineCore:
    """One engine. `handle` takes a message, `step` makes one turn, `serve` does both for ever.

    `send(client_index, message)` takes what is to go out; it must not block.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        scheduler: Scheduler,
        info: EngineInfo,
        send: Callable[[int, CoreMessage], None],
        num_clients: int,
        async_scheduling: bool,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._info = info
        self._send = send
        self._num_clients = num_clients
        self._max_in_flight = 2 if async_scheduling else 1
        self._in_flight: deque[InFlight] = deque()
        self._client_of: dict[str, int] = {}  # open requests
        self._recovery = Recovery(scheduler, runner.reset)

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self._scheduler.has_unfinished

    def serve(self, inbox: "queue.SimpleQueue[Incoming]") -> None:
        """Runs until a Shutdown message; sleeps while there is nothing to do.

        What leaves through here ends the core: an exception that recovery.py had no answer to.
        """
        while self._drain(inbox):
            self.step()

    def handle(self, client_index: int, message: ClientMessage) -> None:
        """Takes a message other than Shutdown."""
        match message:
            case AddRequest():
                self._add(client_index, message)
            case AbortRequests():
                self._abort(client_index, message.request_ids)
            case ResetPrefixCache():
                self._scheduler.reset_prefix_cache()
            case Shutdown():
                raise AssertionError("Shutdown is for the loop")

    def step(self) -> None:
        """One turn: dispatch the next step, then read the oldest one if it is its time.

        The device always has the next step queued while the host deals with the last one. With
        `async_scheduling` off, the result is read before anything else is scheduled.
        """
        try:
            self._turn()
        except StepFailedError as failure:
            self._in_flight.clear()
            blamed = self._recovery.failed(failure)
            self._emit([] if blamed is None else [blamed])

    def _turn(self) -> None:
        depth = self._max_in_flight
        if self._recovery.is_isolating:
            self._recovery.prepare()
            depth = 1
        step = self._schedule()
        if step is not None:
            self._dispatch(step)
        if self._in_flight and (step is None or len(self._in_flight) >= depth):
            self._finish_oldest()
        elif step is None and self._scheduler.has_unfinished:
            # Going on would spin for ever with requests that nobody will ever serve.
            raise RuntimeError("the scheduler holds requests that it cannot run")

    def _schedule(self) -> ScheduledStep | None:
        try:
            return self._scheduler.schedule()
        except Exception as error:
            raise StepFailedError([]) from error

    def _dispatch(self, step: ScheduledStep) -> None:
        try:
            pending = self._runner.dispatch(step)
        except Exception as error:
            # The one before may be to blame: its outputs are this one's inputs.
            before = [in_flight.step for in_flight in self._in_flight]
            raise StepFailedError([*before, step]) from error
        self._in_flight.append(InFlight(step, pending))

    def _drain(self, inbox: "queue.SimpleQueue[Incoming]") -> bool:
        """Handles what has come, waiting only while idle; False when it is time to end."""
        while True:
            try:
                client_index, message = inbox.get(block=not self.has_work)
            except queue.Empty:
                return True
            if isinstance(message, Shutdown):
                return False
            self.handle(client_index, message)

    def _add(self, client_index: int, message: AddRequest) -> None:
        rejected: Rejected | None = None
        try:
            if message.request_id in self._client_of:
                raise RequestError(
                    f"request_id {message.request_id!r} is in use.", param="request_id"
                )
            self._scheduler.add(make_request(message, self._info, client_index=client_index))
        except RequestError as error:
            rejected = Rejected(
                request_id=message.request_id,
                kind="invalid",
                message=str(error),
                param=error.param,
            )
        except QueueFullError as error:
            rejected = Rejected(
                request_id=message.request_id, kind="queue_full", message=str(error)
            )
        if rejected is None:
            self._client_of[message.request_id] = client_index
        else:
            self._send(client_index, rejected)

    def _abort(self, client_index: int, request_ids: list[str]) -> None:
        own = [name for name in request_ids if self._client_of.get(name) == client_index]
        aborted = self._scheduler.abort(own)
        # Sent even when nothing else happens, so that the client's figures do not stay behind.
        self._emit(
            [
                SequenceUpdate(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ABORT.value,
                )
                for request in aborted
            ]
        )

    def _finish_oldest(self) -> None:
        step, pending = self._in_flight.popleft()
        try:
            output = pending.result()
        except Exception as error:
            raise StepFailedError([step]) from error
        updates = self._scheduler.update(step, output)
        self._recovery.succeeded(step)
        self._emit(updates, num_tokens=step.num_tokens)

    def _emit(self, updates: list[SequenceUpdate], *, num_tokens: int = 0) -> None:
        """Sends each client its part; an empty one still carries the figures and a sign of life."""
        stats = self._stats()
        parts: list[list[SequenceUpdate]] = [[] for _ in range(self._num_clients)]
        for update in updates:
            if update.finish_reason is None:
                client_index = self._client_of[update.request_id]
            else:
                client_index = self._client_of.pop(update.request_id)
            parts[client_index].append(update)
        for client_index, part in enumerate(parts):
            message = StepUpdate(sequences=part, stats=stats, num_tokens=num_tokens)
            self._send(client_index, message)

    def _stats(self) -> EngineStats:
        return msgspec.structs.replace(
            self._scheduler.stats(),
            num_compiles_after_ready=self._runner.num_compiles_after_ready,
            num_failed_steps_total=self._recovery.num_failures,
        )
