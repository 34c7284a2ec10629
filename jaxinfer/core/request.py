"""A request as the scheduler sees it: tokens, progress, status. Knows no queues, pages or wire."""

import enum
from dataclasses import dataclass, field

from jaxinfer.core.sampling_params import SamplingParams


class FinishReason(enum.StrEnum):
    """Why a request ended, in the API's words; "error" reaches users as an HTTP status."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One sequence to complete (n > 1 is fanned out before it gets here)."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    max_tokens: int  # resolved: never above what the context leaves
    arrival_time_s: float  # time.monotonic()
    priority: int = 0  # lower runs first
    cache_salt: str | None = None
    client_index: int = 0

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = (
        0  # tokens whose KV is (or will be, once dispatched steps end) cached
    )
    num_pending_tokens: int = 0  # sampled by a dispatched step, not yet known to the host
    num_cached_tokens: int = -1  # prefix-cache hit of the first admission; -1 = not yet admitted
    num_preemptions: int = 0
    first_scheduled_time_s: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id that ended it (None for EOS)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens_with_pending(self) -> int:
        return self.num_tokens + self.num_pending_tokens
