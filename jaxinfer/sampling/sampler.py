"""Logits to tokens for a whole batch, inside the one jitted step.

Joins the parts (settings, state, processors, selection) and knows the order; holds no arithmetic
of its own. A batch of greedy sequences without processors pays for an argmax only.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.sampling.params import SamplingBatch, random_bits
from jaxinfer.sampling.processors import mask_padding, process_logits
from jaxinfer.sampling.select import Best, argmax_tokens, draw_tokens
from jaxinfer.sampling.state import SamplerState, advance


class Sampled(NamedTuple):
    """A step's new tokens."""

    token_S: Array  # int32, 0 where not ok
    ok_S: Array  # bool; False: NaN or infinite logits, or settings that forbid every token


def sample(
    logits_SV: Array, batch: SamplingBatch, state: SamplerState, *, vocab_size: int
) -> tuple[Sampled, SamplerState]:
    """Samples one token per row of float32 logits and appends it to the row's slot.

    `vocab_size` is the number of real tokens; logits beyond it are ignored. The token is a function
    of the row's logits, settings, seed, output index and slot state only. Log-probabilities of the
    raw logits are `logprobs.token_logprobs`.
    """
    best, token_S = lax.cond(
        batch.any_random | batch.any_processor, _choose, _choose_greedy, logits_SV, batch, state,
    )  # fmt: skip
    return token_S, state
