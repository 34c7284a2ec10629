"""AsyncEngine: requests as asynchronous iterators over one engine core.

One reader task takes the core's messages and wakes the requests that have news; each request's
consumer takes what has collected since it last looked, so a slow one costs neither memory nor
others' time. A consumer that only waits may be handed an output without being woken (OutputTap).
Imports no JAX. Knows client, tokenizer and requests; must not know HTTP.
"""

import asyncio
import copy
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.core.messages import EngineInfo, EngineStats, Failed, Rejected, StepUpdate
from jaxinfer.core.outputs import RequestOutput
from jaxinfer.core.progress import ProgressCallback, ignore_progress
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.admission import check_priority
from jaxinfer.engine.client import EngineClient, error_from
from jaxinfer.engine.events import CoreBack, CoreLost
from jaxinfer.engine.fan_out import random_seed
from jaxinfer.engine.inputs import InputProcessor, Prompt, ValidatedPrompt
from jaxinfer.engine.launch import supervised_core
from jaxinfer.engine.model_source import load_model_tokenizer
from jaxinfer.engine.output_processor import OutputProcessor
from jaxinfer.engine.request_state import OnFinished, OnStep, OnTokens, OutputKind, RequestState
from jaxinfer.engine.supervisor import SupervisionPolicy
from jaxinfer.errors import EngineDeadError, JaxInferError, QueueFullError, RequestError
from jaxinfer.logging import get_logger
from jaxinfer.tokenizer.tokenizer import Tokenizer

logger = get_logger(__name__)

_LONG_TEXT = 20_000  # characters whose tokenization would hold up the event loop


class OutputTap(Protocol):
    """Takes outputs where the core's message is read, while the consumer waits: waking its task for
    each token would cost more than most have to do with one."""

    def is_open(self) -> bool:
        """An output can be put now. If not, the consumer gets it, with what comes until then."""
        ...

    def put(self, output: RequestOutput) -> None:
        """Must be quick. What it raises is raised where the consumer waits."""
        ...


class _Stream:
    """What a request's consumer waits on. (An asyncio.Event for one waiter, at a third of the
    price: there may be a wait for every token.)"""

    def __init__(self, state: RequestState, tap: OutputTap | None) -> None:
        self.state = state
        self.error: Exception | None = None
        self._tap = tap
        self._has_news = False
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    def deliver(self) -> None:
        """There is news: to the tap if it takes it, else to the consumer, who sees every end."""
        waiter, tap = self._waiter, self._tap
        is_waiting = waiter is not None and not waiter.done()
        if tap is None or not is_waiting or self.state.is_finished or not tap.is_open():
            self._wake()
            return
        try:
            output = self.state.take()
            if output is not None:
                tap.put(output)
        except Exception as error:  # noqa: BLE001 - one request's; the reader serves all
            self.fail(error)

    def fail(self, error: Exception) -> None:
        self.error = error
        self._wake()

    def _wake(self) -> None:
        self._has_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Returns when there is news that no earlier call has seen."""
        if not self._has_news:
            self._waiter = self._loop.create_future()
            await self._waiter
            self._waiter = None
        self._has_news = False


class AsyncEngine:
    """An engine for asyncio programs; all methods are for one event loop.

        engine = AsyncEngine.from_model("path/or/name")
        await engine.start()
        async for output in engine.generate("Hello", SamplingParams(), request_id="1"): ...
        await engine.close()

    `on_tokens` and `on_finished` are called on the loop for every request; they must be quick.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        model_name: str,
        *,
        on_tokens: OnTokens | None = None,
        on_finished: OnFinished | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.stats = EngineStats()
        self.last_step_time_s = time.monotonic()
        self._busy_since_s = self.last_step_time_s
        self._client = client
        self._outputs = OutputProcessor(
            tokenizer, next_seed=random_seed, on_tokens=on_tokens, on_finished=on_finished
        )
        self._inputs: InputProcessor | None = None
        self._streams: dict[int, _Stream] = {}  # by id() of the request's state
        self._reader: asyncio.Task[None] | None = None
        self._death: JaxInferError | None = None
        self._outage: EngineDeadError | None = None  # the core is being restarted
        self._died = asyncio.Event()

    @classmethod
    def from_model(
        cls,
        model: str | None = None,
        *,
        on_progress: ProgressCallback = ignore_progress,
        supervision: SupervisionPolicy | None = None,
        **engine_args: Any,
    ) -> "AsyncEngine":
        """An engine whose core will be a child process; `engine_args` are those of `LLM`.

        A core that dies or stalls fails its open requests and is restarted, as `supervision` says
        (None: as `jaxinfer serve` does without flags).
        """
        if model is not None:
            engine_args["model"] = model
        config = engine_config_from_kwargs(**engine_args)
        loaded = load_model_tokenizer(config, on_progress)
        policy = supervision or SupervisionPolicy()
        client = supervised_core(config, policy, on_progress=on_progress)
        return cls(client, loaded.tokenizer, loaded.name)

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    @property
    def is_ready(self) -> bool:
        """Requests will be served: everything is compiled."""
        return self._inputs is not None and self._outage is None and self.is_alive

    @property
    def is_alive(self) -> bool:
        """It serves, or will again after an outage."""
        return self._death is None and self._client.is_alive

    @property
    def outage(self) -> str | None:
        """Why nothing is served for now: the core was lost and another one is being started."""
        return None if self._outage is None else str(self._outage)

    @property
    def silent_s(self) -> float:
        """How long requests have been open without a step that ended; 0 when none are."""
        if not self.num_inflight:
            return 0.0
        return time.monotonic() - max(self._busy_since_s, self.last_step_time_s)

    @property
    def num_inflight(self) -> int:
        """Requests that have not ended."""
        return self._outputs.num_open

    def observe(
        self,
        *,
        on_tokens: OnTokens | None,
        on_finished: OnFinished | None,
        on_step: OnStep | None = None,
    ) -> None:
        """Replaces the callbacks."""
        self._outputs.on_tokens = on_tokens
        self._outputs.on_finished = on_finished
        self._outputs.on_step = on_step

    async def start(self) -> EngineInfo:
        """Returns when the engine serves; raises what kept it from starting."""
        info = await self._client.start()
        self.last_step_time_s = time.monotonic()
        self._inputs = InputProcessor(self.tokenizer, info)
        self._reader = asyncio.create_task(self._read(), name="engine-reader")
        return info

    async def close(self) -> None:
        """Ends the engine; open requests fail with EngineDeadError. Idempotent."""
        self._die(EngineDeadError("The engine is shutting down."))
        await self._client.close()
        if self._reader is not None:
            await self._reader

    async def wait_dead(self) -> JaxInferError:
        """Returns, with the reason, when the engine will never serve again."""
        await self._died.wait()
        assert self._death is not None
        return self._death

    async def validate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        add_special_tokens: bool = True,
        clamp_max_tokens: bool = False,
        param: str = "prompt",
    ) -> ValidatedPrompt:
        """Everything that can be wrong with a request, before any work: raises RequestError.

        The result may be passed to `generate` in place of the prompt. See `InputProcessor`.
        """
        self._check_serving()
        if self._inputs is None:
            raise EngineDeadError("The engine has not started.")
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        options = {
            "add_special_tokens": add_special_tokens,
            "clamp_max_tokens": clamp_max_tokens,
            "param": param,
        }
        if isinstance(text, str) and len(text) > _LONG_TEXT:
            return await asyncio.to_thread(self._inputs.validate, prompt, params, **options)
        return self._inputs.validate(prompt, params, **options)

    async def generate(
        self,
        prompt: Prompt | ValidatedPrompt,
        params: SamplingParams | None = None,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        output_kind: OutputKind = "cumulative",
        tap: OutputTap | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields outputs until one is `finished`; closing the iterator aborts the request.

        "cumulative": each output holds everything so far. "delta": only completions with news,
        and of them only what is new. "final": one output. While the iterator is waited on, an open
        `tap` gets what would be yielded, but for the last output. Raises RequestError,
        QueueFullError (both before the first output) and EngineDeadError.
        """
        if not isinstance(prompt, ValidatedPrompt):
            prompt = await self.validate(prompt, params or SamplingParams())
        self._check_serving()
        check_priority(priority, self.info)
        if not self.num_inflight:
            self._busy_since_s = time.monotonic()
        new = self._outputs.add(
            request_id,
            prompt,
            output_kind=output_kind,
            priority=priority,
            cache_salt=cache_salt,
        )
        stream = _Stream(new.state, tap)
        self._streams[id(new.state)] = stream
        try:
            for message in new.messages:
                await self._client.add(message)
            while True:
                await stream.wait()
                if stream.error is not None:
                    raise stream.error
                output = new.state.take()
                if output is not None:
                    yield output
                    if output.finished:
                        return
        finally:
            # Left early, by whatever way: the core must not work for nobody.
            del self._streams[id(new.state)]
            unfinished = self._outputs.abort(new.state)
            if unfinished:
                await self._client.abort(unfinished)

    async def abort(self, request_id: str) -> None:
        """Ends requests of that id; their iterators yield what there is, with reason "abort"."""
        for state in list(self._outputs.open_requests()):
            if state.request_id == request_id:
                await self._client.abort(self._outputs.abort(state))
                self._deliver(state)

    async def reset_prefix_cache(self) -> None:
        await self._client.reset_prefix_cache()

    async def _read(self) -> None:
        """The reader task. However it ends, nobody may be left waiting."""
        try:
            async for message in self._client.messages():
                match message:
                    case StepUpdate():
                        await self._take_step(message)
                    case Rejected():
                        await self._take_rejection(message)
                    case Failed():
                        self._die(error_from(message))
                    case CoreLost():
                        self._lose(message)
                    case CoreBack():
                        self._regain(message)
                    case _:
                        logger.warning("unexpected %s from the core", type(message).__name__)
        except Exception as error:  # noqa: BLE001 - the task's boundary: a bug must not hang users
            logger.exception("the engine's reader failed")
            self._die(EngineDeadError(f"The engine's client failed: {error!r}"))
        finally:
            self._die(EngineDeadError("The engine has stopped."))

    async def _take_step(self, update: StepUpdate) -> None:
        self.stats = update.stats
        self.last_step_time_s = time.monotonic()
        processed = self._outputs.process(update)
        for state in processed.changed:
            self._deliver(state)
        if processed.aborts:
            await self._client.abort(processed.aborts)

    async def _take_rejection(self, rejected: Rejected) -> None:
        state = self._outputs.find(rejected.request_id)
        if state is None:
            return
        siblings = [name for name in self._outputs.forget(state) if name != rejected.request_id]
        if siblings:
            await self._client.abort(siblings)
        stream = self._streams.get(id(state))
        if stream is None:
            return
        if rejected.kind == "queue_full":
            stream.fail(QueueFullError(rejected.message))
        else:
            stream.fail(RequestError(rejected.message, param=rejected.param))

    def _deliver(self, state: RequestState) -> None:
        stream = self._streams.get(id(state))
        if stream is not None:
            stream.deliver()

    def _check_serving(self) -> None:
        problem = self._death or self._outage
        if problem is not None:
            # (A copy: an exception keeps the frames of everyone who ever raised it.)
            raise copy.copy(problem)

    def _lose(self, lost: CoreLost) -> None:
        self.stats = lost.stats
        self._outage = EngineDeadError(lost.reason)
        self._fail_open(self._outage)

    def _regain(self, back: CoreBack) -> None:
        self.stats = back.stats
        self.last_step_time_s = time.monotonic()
        self._inputs = InputProcessor(self.tokenizer, back.info)
        self._outage = None

    def _die(self, error: JaxInferError) -> None:
        """Fails all that is open, once; what comes later meets the same error."""
        if self._death is not None:
            return
        self._death = error
        self._died.set()
        self._fail_open(error)

    def _fail_open(self, error: JaxInferError) -> None:
        for state in list(self._outputs.open_requests()):
            self._outputs.forget(state)
        for stream in self._streams.values():
            if not stream.state.is_finished:
                stream.fail(copy.copy(error))
