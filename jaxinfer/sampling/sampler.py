"""Logits to tokens for a whole batch, inside the one jitted step.

Joins the parts (settings, state, processors, selection) and knows the order; holds no arithmetic
of its own. A batch of greedy sequences without processors pays for an argmax only.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from jaxinfer.parallel.rules import replicated, sharding_of
from jaxinfer.sampling.params import SamplingBatch, random_bits
from jaxinfer.sampling.processors import mask_padding, process_logits
from jaxinfer.sampling.select import Best, argmax_tokens, draw_tokens
from jaxinfer.sampling.state import SamplerState, advance

_ROWS_AT_ONCE = 16


class Sampled(NamedTuple):
    """A step's new tokens."""

    token_S: Array  # int32, 0 where not ok
    ok_S: Array  # bool; False: NaN or infinite logits, or settings that forbid every token


def sample(
    logits_SV: Array, batch: SamplingBatch, state: SamplerState, *, vocab_size: int, mesh: Mesh
) -> tuple[Sampled, SamplerState]:
    """Samples one token per row of float32 logits and appends it to the row's slot.

    The logits may be split over `mesh` by the vocabulary. Greedy rows are chosen where their
    logits lie; only a batch with others has them brought together.
    `vocab_size` is the number of real tokens; logits beyond it are ignored. The token is a function
    of the row's logits, settings, seed, output index and slot state only. Log-probabilities of the
    raw logits are `logprobs.token_logprobs`.
    """
    masked = partial(mask_padding, vocab_size=vocab_size)  # in each branch, so that it is fused

    def choose(logits_CV: Array, batch: SamplingBatch) -> Best:
        return _process_and_choose(masked(logits_CV), batch, state)

    def choose_any() -> Best:
        whole_SV = lax.with_sharding_constraint(logits_SV, replicated(mesh))
        return _map_rows(choose, whole_SV, batch)

    def choose_greedily() -> Best:
        # Said here again: else the other branch's wish decides for both, and every step gathers.
        split_SV = lax.with_sharding_constraint(logits_SV, sharding_of(mesh, "SV"))
        return argmax_tokens(masked(split_SV))

    chosen = lax.cond(
        jnp.any(batch.is_random | batch.changes_some | batch.changes_all),
        choose_any,
        choose_greedily,
    )
    # The best logit shows every failure: it is NaN if one logit is, -inf if all are.
    ok_S = jnp.isfinite(chosen.logit_S)
    sampled = Sampled(token_S=jnp.where(ok_S, chosen.token_S, 0), ok_S=ok_S)
    return sampled, advance(state, batch.slot, sampled.token_S)


def _map_rows(
    choose: Callable[[Array, SamplingBatch], Best], logits_SV: Array, batch: SamplingBatch
) -> Best:
    """Chooses for 16 rows at a time.

    Bounds what the filters hold (a few times 16 V floats instead of S V), which on the CPU is also
    several times faster: the memory stays in the cache and is not mapped anew every step. And
    what no row of a chunk needs is skipped for that chunk.
    """
    num_seqs = logits_SV.shape[0]
    if num_seqs <= _ROWS_AT_ONCE:
        return choose(logits_SV, batch)
    num_chunks = -(-num_seqs // _ROWS_AT_ONCE)

    def split(values: Array) -> Array:
        num_added = num_chunks * _ROWS_AT_ONCE - num_seqs  # rows of zeros have no flags
        padded = jnp.pad(values, ((0, num_added),) + ((0, 0),) * (values.ndim - 1))
        return padded.reshape(num_chunks, _ROWS_AT_ONCE, *values.shape[1:])

    chunks = jax.tree.map(split, (logits_SV, batch))
    chosen = lax.map(lambda chunk: choose(*chunk), chunks)
    return jax.tree.map(lambda leaf: leaf.reshape(-1)[:num_seqs], chosen)


def _process_and_choose(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Best:
    """The chosen tokens, each with the best logit of its row."""
    logits_SV = process_logits(logits_SV, batch, state)
    best = argmax_tokens(logits_SV)
    token_S = lax.cond(
        jnp.any(batch.is_random),
        lambda: draw_tokens(logits_SV, best, batch, random_bits(batch)),
        lambda: best.token_S,
    )
    return best._replace(token_S=jnp.where(batch.is_random, token_S, best.token_S))
