"""What a user of `LLM` or `AsyncEngine` gets back; shaped like vLLM's `RequestOutput`.

Structs where one is made for every token: a dataclass takes five times as long to make.
"""

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability (natural log) of one token at one position."""

    logprob: float
    rank: int | None = None  # 1 = most likely
    decoded_token: str | None = None


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One of the n completions of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | str | None = None  # the stop token id or string that ended it
    error: str | None = None  # why it has finish_reason "error"

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """Times of one request, seconds; `*_time_s` are on the `time.monotonic()` clock."""

    arrival_time_s: float
    first_token_time_s: float | None = None
    last_token_time_s: float | None = None
    finished_time_s: float | None = None
    queue_time_s: float | None = None


class RequestOutput(msgspec.Struct, kw_only=True):
    """A request and its completions so far (all of it when `finished`)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = msgspec.field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int | None = None
    metrics: RequestMetrics | None = None
