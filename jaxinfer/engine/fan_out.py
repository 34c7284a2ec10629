"""From one validated request to the messages that ask a core for its n sequences.

Also here: what gives an unseeded request its seed, so that a core is deterministic given its
messages. Knows messages; no tokens' text, no queues.
"""

import itertools
import secrets
from collections.abc import Callable

import msgspec

from jaxinfer.core.messages import AddRequest
from jaxinfer.core.sampling_params import SamplingParams

SeedSource = Callable[[], int]


def random_seed() -> int:
    return secrets.randbits(63)


class RequestIds:
    """Names for sequences that no other request has, whatever ids users choose."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(4)  # other clients may share the core
        self._serials = itertools.count()

    def new(self, request_id: str, n: int) -> list[str]:
        serial = next(self._serials)
        return [f"{request_id}/{self._prefix}-{serial}-{index}" for index in range(n)]


def fan_out(
    sequence_ids: list[str],
    token_ids: list[int],
    params: SamplingParams,
    *,
    arrival_time_s: float,
    next_seed: SeedSource,
    priority: int = 0,
    cache_salt: str | None = None,
) -> list[AddRequest]:
    """One message per sequence: seed + i when the user gave a seed, else independent seeds.

    The prompt's log-probabilities are the same for all n, so only the first computes them.
    """
    return [
        AddRequest(
            request_id=sequence_id,
            prompt_token_ids=token_ids,
            sampling=_child_params(params, index, next_seed),
            arrival_time_s=arrival_time_s,
            priority=priority,
            cache_salt=cache_salt,
        )
        for index, sequence_id in enumerate(sequence_ids)
    ]


def _child_params(params: SamplingParams, index: int, next_seed: SeedSource) -> SamplingParams:
    """What the core needs: stop strings are matched in the text, on this side."""
    return msgspec.structs.replace(
        params,
        n=1,
        seed=next_seed() if params.seed is None else _wrap_int64(params.seed + index),
        prompt_logprobs=params.prompt_logprobs if index == 0 else None,
        stop=[],
    )


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
