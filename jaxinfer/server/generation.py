"""The one way from a checked request to the engine's outputs, shared by every generating route.

Tokenizes (off the event loop when the text is long), lets the engine validate, runs the prompts of
a request together, and keeps the books: metrics, in-flight count, the log line's summary. Closing
the stream of outputs aborts what still runs. Knows engines and tokens; no JSON, no HTTP.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from jaxinfer.core.outputs import RequestOutput
from jaxinfer.core.request import FinishReason
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.errors import JaxInferError, RequestError
from jaxinfer.server.sampling import Sampling
from jaxinfer.server.state import Serving, ServerState

# Above this, encoding takes longer than a step of the event loop may.
_LONG_TEXT_CHARS = 20_000

OutputKind = Literal["delta", "final"]


class Prompt(NamedTuple):
    """A prompt the engine has accepted. `text` is None when the client sent tokens."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams


class PromptOutput(NamedTuple):
    """News of the prompt with this index."""

    index: int
    output: RequestOutput


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request's worth of generation."""

    request_id: str
    prompts: Sequence[Prompt]
    n: int
    priority: int = 0
    cache_salt: str | None = None


@dataclass(kw_only=True)
class Summary:
    """What the log line says of a generation."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    ttft_s: float | None = None
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ttft = "" if self.ttft_s is None else f" ttft={self.ttft_s:.3f}s"
        return (
            f"prompt={self.num_prompt_tokens} cached={self.num_cached_tokens} "
            f"output={self.num_output_tokens}{ttft} finish={','.join(self.reasons) or '-'}"
        )


async def encode(serving: Serving, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of `text`; raises RequestError for a text that cannot fit any context."""

    def work() -> list[int]:
        return serving.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    if len(text) <= _LONG_TEXT_CHARS:
        return work()
    longest = await asyncio.to_thread(lambda: serving.longest_token_bytes)
    least = len(text) // longest
    if least > serving.info.max_model_len:
        raise RequestError(
            f"This model's maximum context length is {serving.info.max_model_len} tokens. However, "
            f"your prompt has {len(text)} characters, which are at least {least} tokens. "
            "Shorten the prompt.",
            param=param,
        )
    return await asyncio.to_thread(work)


async def prepare(
    serving: Serving,
    prompt: str | list[int],
    sampling: Sampling,
    *,
    add_special_tokens: bool,
    param: str,
) -> Prompt:
    """Raises RequestError for everything that is wrong with the request: call before answering."""
    text = prompt if isinstance(prompt, str) else None
    if isinstance(prompt, str):
        token_ids = await encode(
            serving, prompt, add_special_tokens=add_special_tokens, param=param
        )
    else:
        token_ids = prompt
    params = _fit_default_max_tokens(sampling, len(token_ids), serving.info.max_model_len)
    try:
        valid = await serving.engine.validate(token_ids, params)
    except RequestError as error:
        # The engine knows prompts; the client knows the field it sent.
        name = param if error.param in ("prompt", "prompt_token_ids") else error.param
        raise RequestError(str(error), param=name) from None
    return Prompt(text, valid.prompt_token_ids, valid.params)


def _fit_default_max_tokens(
    sampling: Sampling, num_prompt_tokens: int, max_model_len: int
) -> SamplingParams:
    """A default of ours must not make a request too long; the client's own number may."""
    params, given = sampling
    if given or params.max_tokens is None:
        return params
    kept = params.truncate_prompt_tokens
    if kept is not None and kept >= 0:
        num_prompt_tokens = min(num_prompt_tokens, kept)
    room = max_model_len - num_prompt_tokens
    if room >= params.max_tokens or room <= 0:
        return params
    return msgspec.structs.replace(params, max_tokens=max(room, params.min_tokens))


async def generate(
    state: ServerState, serving: Serving, job: Job, summary: Summary, kind: OutputKind
) -> AsyncGenerator[PromptOutput, None]:
    """Runs the job. Raises QueueFullError or EngineDeadError; both may come before any output."""
    books = _Books(serving, job, summary)
    state.begin()
    try:
        async with aclosing(_run(serving, job, kind)) as outputs:
            async for item in outputs:
                books.see(item, kind)
                yield item
        books.close(FinishReason.ABORT)
    except JaxInferError:
        books.close(FinishReason.ERROR)
        raise
    finally:
        # Cancelled or closed early: the client went away.
        books.close(FinishReason.ABORT)
        state.end()


def _run(serving: Serving, job: Job, kind: OutputKind) -> AsyncGenerator[PromptOutput, None]:
    streams = [_one(serving, job, index, kind) for index in range(len(job.prompts))]
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _one(
    serving: Serving, job: Job, index: int, kind: OutputKind
) -> AsyncGenerator[PromptOutput, None]:
    prompt = job.prompts[index]
    outputs = serving.engine.generate(
        prompt.token_ids,
        prompt.params,
        # The public id may be the client's own, hence not unique.
        request_id=f"{job.request_id}-{index}-{uuid.uuid4().hex[:12]}",
        priority=job.priority,
        cache_salt=job.cache_salt,
        output_kind=kind,
    )
    async with aclosing(outputs) as open_outputs:
        async for output in open_outputs:
            yield PromptOutput(index, output)


async def _merge(
    streams: Sequence[AsyncGenerator[PromptOutput, None]],
) -> AsyncGenerator[PromptOutput, None]:
    """Outputs of all streams as they come; the first failure ends all of them."""
    queue: asyncio.Queue[PromptOutput | JaxInferError | None] = asyncio.Queue(maxsize=1)

    async def pump(stream: AsyncIterator[PromptOutput]) -> None:
        try:
            async for item in stream:
                await queue.put(item)
            await queue.put(None)
        except JaxInferError as error:
            await queue.put(error)

    async def pump_and_close(stream: AsyncGenerator[PromptOutput, None]) -> None:
        async with aclosing(stream):
            await pump(stream)

    tasks = [asyncio.create_task(pump_and_close(stream)) for stream in streams]
    try:
        open_streams = len(streams)
        while open_streams:
            item = await queue.get()
            if isinstance(item, JaxInferError):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Books:
    """Metrics and summary of one job."""

    def __init__(self, serving: Serving, job: Job, summary: Summary) -> None:
        self._metrics = serving.metrics
        self._job = job
        self._summary = summary
        self._arrival_s = time.monotonic()
        self._num_tokens = [0] * len(job.prompts)
        self._last_token_s: list[float | None] = [None] * len(job.prompts)
        self._num_unfinished = len(job.prompts) * job.n
        self._accepted = [False] * len(job.prompts)
        self._is_closed = False
        summary.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)

    def see(self, item: PromptOutput, kind: OutputKind) -> None:
        index, output = item
        if not self._accepted[index]:
            self._accept(index, output)
        num_new = 0
        for choice in output.outputs:
            num_new += len(choice.token_ids)
            if choice.finish_reason is not None:
                self._num_unfinished -= 1
                self._metrics.finished(choice.finish_reason)
                self._summary.reasons.append(choice.finish_reason)
        self._num_tokens[index] += num_new
        self._summary.num_output_tokens += num_new
        self._metrics.generation_tokens.inc(num_new)
        self._observe_times(index, output, num_new, kind)

    def _accept(self, index: int, output: RequestOutput) -> None:
        self._accepted[index] = True
        prompt = self._job.prompts[index]
        self._metrics.accepted(
            num_prompt_tokens=len(prompt.token_ids),
            n=prompt.params.n,
            max_tokens=prompt.params.max_tokens,
        )
        self._summary.num_cached_tokens += output.num_cached_tokens or 0

    def _observe_times(
        self, index: int, output: RequestOutput, num_new: int, kind: OutputKind
    ) -> None:
        times = output.metrics
        if times is None:
            return
        last_s = self._last_token_s[index]
        if last_s is None and times.first_token_time_s is not None:
            ttft_s = times.first_token_time_s - times.arrival_time_s
            self._metrics.ttft.observe(ttft_s)
            if self._summary.ttft_s is None:
                self._summary.ttft_s = ttft_s
            last_s, num_new = times.first_token_time_s, num_new - self._job.n
        now_s = times.last_token_time_s
        if last_s is not None and now_s is not None:
            # n sequences step side by side; news that waited for us came at an even pace.
            steps = max(0, num_new) // self._job.n
            for _ in range(steps):
                self._metrics.itl.observe((now_s - last_s) / steps)
            self._last_token_s[index] = now_s
        if output.finished:
            self._metrics.request_ended(
                times, num_tokens=self._num_tokens[index], end_time_s=time.monotonic()
            )

    def close(self, reason: FinishReason) -> None:
        """Whatever has not ended yet ended for `reason`. Later calls do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._num_unfinished:
            self._metrics.finished(reason, count=self._num_unfinished)
            self._summary.reasons.append(reason)
