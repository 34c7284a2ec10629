"""The list of work of a step on a GPU: which thread block attends what. Plain jnp, any backend.

Knows lengths and counts; no pages, no heads' contents and no kernels. Computed once a step and
read by all layers.

Two lists, each padded to a static length, since a grid is static:

* splits of decodes (N). A sequence's keys are cut into runs of whole units of `UNIT` keys, so
  that few long sequences still fill the machine (split-KV, "Flash-Decoding", Dao et al. 2023).
  The run length is one for the whole step, so all blocks read about as much.
* blocks of queries of prefill chunks (I), each `tokens_per_block` tokens of one sequence, the
  last blocks of a sequence first: under a causal mask they read the most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.api import StepLayout

UNIT = 128  # keys; a whole number of every kernel's blocks of keys
MIN_UNITS = 2  # of a split: what a thread block must read to be worth its start
WAVES = 4  # when there are more sequences than the machine holds blocks, for an even end


class DecodeSplits(NamedTuple):
    """Runs of keys that a thread block attends to; all int32."""

    # Of each split: the sequence's row of the page table, the position of its query, the first
    # key of the run and the key behind its last. Zeros: no such split.
    info_N4: Array
    seq_N: Array  # [N] its sequence
    starts_S1: Array  # [S+1] first split of each sequence; the last entry is how many there are


class PrefillBlocks(NamedTuple):
    """Blocks of queries; int32."""

    # Of each block: the sequence's row of the page table, the position of its first query, that
    # query's token in the step, and how many tokens. No tokens: no such block.
    info_I4: Array


def num_splits(num_seqs: int, blocks_at_once: int) -> int:
    """The static length of the list of splits. `blocks_at_once`: that the device runs per head."""
    return WAVES * blocks_at_once + num_seqs


def split_decodes(layout: StepLayout, *, blocks_at_once: int) -> DecodeSplits:
    """Cuts the keys of the step's decodes; see the module."""
    num_seqs = layout.slots_S.shape[0]
    seqs_S = jax.lax.iota("int32", num_seqs)
    is_decode_S = seqs_S < layout.num_decodes
    units_S = jnp.where(is_decode_S, layout.starts_S // UNIT + 1, 0)  # the new token's included
    total = units_S.sum(dtype="int32")
    # As many splits as run at once if the sequences leave room; else several times as many,
    # since then the splits are mostly whole sequences of unequal lengths.
    target = jnp.where(layout.num_decodes <= blocks_at_once, 1, WAVES) * blocks_at_once
    run = jnp.maximum(-(-total // target), MIN_UNITS).astype("int32")
    ends_S = jnp.cumsum(-(-units_S // run), dtype="int32")
    starts_S1 = jnp.concatenate([jnp.zeros((1,), "int32"), ends_S])
    splits_N = jax.lax.iota("int32", num_splits(num_seqs, blocks_at_once))
    seq_N = (splits_N[:, None] >= ends_S[None, :]).sum(axis=1, dtype="int32")
    seq_N = seq_N.clip(max=num_seqs - 1)
    first_N = (splits_N - starts_S1[seq_N]) * run * UNIT
    position_N = layout.starts_S[seq_N]
    end_N = jnp.minimum(first_N + run * UNIT, position_N + 1)
    info_N4 = jnp.stack([layout.slots_S[seq_N], position_N, first_N, end_N], axis=1)
    is_real_N = splits_N < ends_S[-1]
    return DecodeSplits(
        info_N4=jnp.where(is_real_N[:, None], info_N4, 0), seq_N=seq_N, starts_S1=starts_S1
    )


def num_blocks(num_tokens: int, num_seqs: int, tokens_per_block: int) -> int:
    """The static length of the list of query blocks; a prefill chunk has two tokens or more."""
    return num_tokens // tokens_per_block + min(num_seqs, num_tokens // 2)


def block_prefills(layout: StepLayout, *, num_tokens: int, tokens_per_block: int) -> PrefillBlocks:
    """Cuts the queries of the step's prefill chunks; see the module."""
    num_seqs = layout.slots_S.shape[0]
    seqs_S = jax.lax.iota("int32", num_seqs)
    is_prefill_S = (seqs_S >= layout.num_decodes) & (seqs_S < layout.num_seqs)
    lengths_S = jnp.where(is_prefill_S, jnp.diff(layout.query_starts_S1), 0)
    blocks_S = -(-lengths_S // tokens_per_block)
    ends_S = jnp.cumsum(blocks_S, dtype="int32")
    blocks_I = jax.lax.iota("int32", num_blocks(num_tokens, num_seqs, tokens_per_block))
    seq_I = (blocks_I[:, None] >= ends_S[None, :]).sum(axis=1, dtype="int32")
    seq_I = seq_I.clip(max=num_seqs - 1)
    offset_I = (ends_S[seq_I] - 1 - blocks_I) * tokens_per_block  # the sequence's last block first
    count_I = (lengths_S[seq_I] - offset_I).clip(max=tokens_per_block)
    position_I = layout.starts_S[seq_I] + offset_I
    token_I = layout.query_starts_S1[seq_I] + offset_I
    info_I4 = jnp.stack([layout.slots_S[seq_I], position_I, token_I, count_I], axis=1)
    is_real_I = blocks_I < ends_S[-1]
    return PrefillBlocks(info_I4=jnp.where(is_real_I[:, None], info_I4, 0))
