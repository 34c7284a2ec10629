"""The one way from a checked request to the engine's outputs, shared by every generating route.

Tokenizes (off the event loop when the text is long), lets the engine validate, runs the prompts of
a request together, and counts what the answer and the log say of it. Closing the stream of outputs
aborts what still runs. Knows engines and tokens; no JSON, no HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from jaxinfer.core.outputs import RequestOutput
from jaxinfer.core.request import FinishReason
from jaxinfer.engine.async_engine import OutputTap
from jaxinfer.engine.inputs import ValidatedPrompt
from jaxinfer.errors import RequestError
from jaxinfer.server.sampling import Sampling
from jaxinfer.server.state import ServerState, Serving

# Above this, encoding takes longer than a step of the event loop may.
_LONG_TEXT_CHARS = 20_000

OutputKind = Literal["delta", "final"]


class PromptOutput(msgspec.Struct, frozen=True):
    """News of one of the prompts. (A Struct: it is made for every token.)"""

    prompt_index: int
    output: RequestOutput


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request's worth of generation; its prompts share their sampling."""

    request_id: str
    prompts: Sequence[ValidatedPrompt]
    n: int
    priority: int = 0
    cache_salt: str | None = None


@dataclass(kw_only=True)
class Summary:
    """The numbers of a generation, for `usage` and for the log line."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    ttft_s: float | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def num_cached_tokens(self) -> int:
        return sum(self.cached_tokens.values())

    def see(self, item: PromptOutput) -> None:
        output = item.output
        if output.num_cached_tokens:
            self.cached_tokens[item.prompt_index] = output.num_cached_tokens
        for choice in output.outputs:
            self.num_output_tokens += len(choice.token_ids)
            if choice.finish_reason is not None:
                self.reasons.append(choice.finish_reason)
        times = output.metrics
        if self.ttft_s is None and times is not None and times.first_token_time_s is not None:
            self.ttft_s = times.first_token_time_s - times.arrival_time_s

    def __str__(self) -> str:
        ttft = "" if self.ttft_s is None else f" ttft={self.ttft_s:.3f}s"
        return (
            f"prompt={self.num_prompt_tokens} cached={self.num_cached_tokens} "
            f"output={self.num_output_tokens}{ttft} finish={','.join(self.reasons) or '-'}"
        )


class PromptTap(Protocol):
    """An OutputTap, but for prompts' outputs."""

    def is_open(self) -> bool: ...

    def put(self, item: PromptOutput) -> None: ...


class _SummingTap:
    """Between the engine and a tap: what passes is seen by the summary, as what is yielded is."""

    def __init__(self, tap: PromptTap, summary: Summary) -> None:
        self.is_open = tap.is_open
        self._tap = tap
        self._summary = summary

    def put(self, output: RequestOutput) -> None:
        item = PromptOutput(0, output)
        self._summary.see(item)
        self._tap.put(item)


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
            "Please shorten the prompt.",
            param=param,
        )
    return await asyncio.to_thread(work)


def check_count(serving: Serving, *, num_prompts: int, n: int) -> None:
    """Raises RequestError for more sequences than can ever wait: 429 would mean "try again"."""
    num, limit = num_prompts * n, serving.max_num_queued
    if num <= limit:
        return
    many = (
        f"{num_prompts} prompts with n={n} are {num}"
        if num_prompts > 1
        else f"n={n} asks for {num}"
    )
    raise RequestError(
        f"{many} completions at once; this server queues at most {limit} (--max-num-queued-reqs). "
        "Ask for fewer in one request.",
        param="n" if num_prompts <= limit else "prompt",
    )


async def prepare(
    serving: Serving,
    prompt: str | list[int],
    sampling: Sampling,
    *,
    add_special_tokens: bool,
    param: str,
) -> ValidatedPrompt:
    """Raises RequestError for everything that is wrong with the request: call before answering."""
    if isinstance(prompt, str):
        token_ids = await encode(
            serving, prompt, add_special_tokens=add_special_tokens, param=param
        )
        tokens = {"prompt": prompt, "prompt_token_ids": token_ids}
    else:
        tokens = {"prompt_token_ids": prompt}
    try:
        return await serving.engine.validate(
            tokens,
            sampling.params,
            # A default of ours must not make a request too long; the client's own number may.
            clamp_max_tokens=sampling.max_tokens_field is None,
            param=param,
        )
    except RequestError as error:
        if error.param != "max_tokens" or sampling.max_tokens_field is None:
            raise
        raise RequestError(str(error), param=sampling.max_tokens_field) from None


async def generate(
    state: ServerState,
    serving: Serving,
    job: Job,
    summary: Summary,
    kind: OutputKind,
    tap: PromptTap | None = None,
) -> AsyncGenerator[PromptOutput, None]:
    """Runs the job. Raises QueueFullError or EngineDeadError; both may come before any output.

    Outputs of a single prompt may go to `tap`, see `OutputTap`.
    """
    summary.num_prompt_tokens = sum(len(prompt.prompt_token_ids) for prompt in job.prompts)
    num_unfinished = len(job.prompts) * job.n
    inner = _SummingTap(tap, summary) if tap is not None and len(job.prompts) == 1 else None
    streams = [_start(serving, job, index, kind, inner) for index in range(len(job.prompts))]
    state.begin()
    try:
        if len(streams) == 1:  # one generator less for each token to pass through
            async with aclosing(streams[0]) as outputs:
                async for output in outputs:
                    item = PromptOutput(0, output)
                    summary.see(item)
                    yield item
        else:
            async with aclosing(_merge(streams)) as items:
                async for item in items:
                    summary.see(item)
                    yield item
    finally:
        if len(summary.reasons) < num_unfinished:
            summary.reasons.append(FinishReason.ABORT)
        state.end()


def _start(
    serving: Serving, job: Job, index: int, kind: OutputKind, tap: OutputTap | None
) -> AsyncGenerator[RequestOutput, None]:
    """The outputs of one prompt, which begins to run when the first one is asked for."""
    return serving.engine.generate(
        job.prompts[index],
        job.prompts[index].params,
        request_id=job.request_id if len(job.prompts) == 1 else f"{job.request_id}-{index}",
        priority=job.priority,
        cache_salt=job.cache_salt,
        output_kind=kind,
        tap=tap,
    )


async def _merge(
    streams: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[PromptOutput, None]:
    """Outputs of all streams as they come; the first failure ends all of them."""
    queue: asyncio.Queue[PromptOutput | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, stream: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(stream):
                async for output in stream:
                    await queue.put(PromptOutput(index, output))
            await queue.put(None)
        except Exception as error:  # noqa: BLE001 - raised again where the outputs are read
            await queue.put(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        open_streams = len(streams)
        while open_streams:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
