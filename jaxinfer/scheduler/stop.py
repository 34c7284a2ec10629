"""When a new token ends a sequence. Knows token ids only; stop strings are the client's part.

The order is vLLM's: end-of-sequence token, stop_token_ids, length. Neither of the first two counts
before `min_tokens` tokens are out. The context length needs no check here: a request is accepted
only if prompt and max_tokens fit in it.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxinfer.core.request import FinishReason, Request


class Stop(NamedTuple):
    """Why a sequence ends."""

    reason: FinishReason
    token_id: int | None = None  # of stop_token_ids; None for EOS and for length


_EOS = Stop(FinishReason.STOP)
_LENGTH = Stop(FinishReason.LENGTH)


@dataclass(frozen=True, kw_only=True, slots=True)
class StopConditions:
    """The token-level stop conditions of one request."""

    eos_token_ids: frozenset[int]  # empty with ignore_eos
    stop_token_ids: frozenset[int]
    min_tokens: int
    max_tokens: int

    def check(self, token_id: int, num_output_tokens: int) -> Stop | None:
        """`token_id` is the newest of `num_output_tokens` output tokens."""
        if num_output_tokens >= self.min_tokens:
            if token_id in self.eos_token_ids:
                return _EOS
            if token_id in self.stop_token_ids:
                return Stop(FinishReason.STOP, token_id)
        return _LENGTH if num_output_tokens >= self.max_tokens else None


def stop_conditions(request: Request) -> StopConditions:
    sampling = request.sampling
    return StopConditions(
        eos_token_ids=frozenset() if sampling.ignore_eos else frozenset(request.eos_token_ids),
        stop_token_ids=frozenset(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        max_tokens=request.max_tokens,
    )
