"""What sampling must remember of each running sequence, on the device, one row a slot.

Knows how the rows are laid out, filled from a request and advanced by a token; knows nothing of
logits. A row is written by `write_slot` when a request that needs it takes the slot; requests
that need none of it leave the row stale, and their flags keep it from being read. Only `recent`'s
newest token is right for every slot that has sampled.

Bytes for R slots and a vocabulary of V: R * (2 V + V/8 + V/8 + 10.7 KiB). For R=256, V=128,256
that is 77 MB, of which the counts are 66 MB.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.core.sampling_params import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

NUM_RECENT = MAX_BAD_WORD_TOKENS
MAX_BANNED_STOPS = MAX_STOP_TOKEN_IDS + 16  # room for a model's own end-of-sequence tokens
NO_TOKEN = -1
_MAX_WORDS = 2 * MAX_BAD_WORDS  # a word may come as two spellings: with and without a space
_MAX_COUNT = np.iinfo(np.uint16).max
_BITS = 32
# Pads lists of token ids. Scatters that drop what is out of range skip it; a negative index would
# count from the end instead.
_NOWHERE = np.iinfo(np.int32).max


class SamplerState(NamedTuple):
    """Rows of all slots, device-resident; donated through every step."""

    recent: Array  # int32 [R, 8], last output tokens, newest last; NO_TOKEN before the first
    output_counts: Array  # uint16 [R, V], how often each token was generated; saturates
    prompt_bits: Array  # uint32 [R, ceil(V/32)], tokens of the prompt
    allowed_bits: Array  # uint32 [R, ceil(V/32)], allowed_token_ids
    bias_ids: Array  # int32 [R, 300]
    bias_values: Array  # float32 [R, 300]
    bad_words: Array  # int32 [R, 256, 8], each word at the end of its row, NO_TOKEN before it
    stop_ids: Array  # int32 [R, 80], tokens that min_tokens forbids


class SlotRow(NamedTuple):
    """One slot's row, in host memory; the fields of `SamplerState` without R."""

    recent: np.ndarray
    output_counts: np.ndarray
    prompt_bits: np.ndarray
    allowed_bits: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray
    bad_words: np.ndarray
    stop_ids: np.ndarray


def init_state(*, max_num_seqs: int, vocab_size: int) -> SamplerState:
    """Empty rows for `max_num_seqs` slots. `vocab_size` may or may not count padding."""
    empty = _empty_row(vocab_size)
    return SamplerState(*(jnp.tile(leaf, (max_num_seqs,) + (1,) * leaf.ndim) for leaf in empty))


def write_slot(state: SamplerState, slot: Array, row: SlotRow) -> SamplerState:
    """Replaces a slot's row. Jit it with `state` donated; it is a program of its own."""
    return SamplerState(*(leaf.at[slot].set(value) for leaf, value in zip(state, row, strict=True)))


def advance(state: SamplerState, slot_S: Array, token_S: Array) -> SamplerState:
    """Appends each row's new token; slots outside the state are dropped.

    Runs for every sequence, needed or not: two small scatters cost less than a choice.
    """
    recent_S8 = state.recent.at[slot_S].get(mode="clip")
    recent_S8 = jnp.concatenate([recent_S8[:, 1:], token_S[:, None]], axis=1)
    count_S = state.output_counts.at[slot_S, token_S].get(mode="clip")
    count_S = jnp.where(count_S == _MAX_COUNT, count_S, count_S + 1)
    return state._replace(
        recent=state.recent.at[slot_S].set(recent_S8, mode="drop"),
        output_counts=state.output_counts.at[slot_S, token_S].set(count_S, mode="drop"),
    )


def needs_slot_row(params: SamplingParams) -> bool:
    """Whether a request with these settings must have its row written before it samples."""
    return bool(
        params.has_penalties
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_words_token_ids
        or params.min_tokens > 0
    )


def slot_row(
    params: SamplingParams,
    *,
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int],
    eos_token_ids: Sequence[int],
    vocab_size: int,
) -> SlotRow:
    """The row of a request that enters a slot, new or resumed with tokens already generated.

    `vocab_size` is the one `init_state` got; every token id must be below it
    (`SamplingParams.validate_for_model`).
    """
    row = _empty_row(vocab_size)
    newest = list(output_token_ids[-NUM_RECENT:])
    if newest:
        row.recent[-len(newest) :] = newest
    counts_V = np.bincount(np.asarray(output_token_ids, np.int64), minlength=vocab_size)
    row.output_counts[:] = np.minimum(counts_V, _MAX_COUNT)
    bias = params.logit_bias or {}
    row.bias_ids[: len(bias)] = list(bias.keys())
    row.bias_values[: len(bias)] = list(bias.values())
    for word, word_row_8 in zip(params.bad_words_token_ids, row.bad_words, strict=False):
        word_row_8[-len(word) :] = word
    banned = sorted({*eos_token_ids, *params.stop_token_ids}) if params.min_tokens else []
    assert len(banned) <= MAX_BANNED_STOPS, f"too many stop tokens: {len(banned)}"
    row.stop_ids[: len(banned)] = banned
    return row._replace(
        prompt_bits=_pack_bits(prompt_token_ids, vocab_size),
        allowed_bits=_pack_bits(params.allowed_token_ids or (), vocab_size),
    )


def _empty_row(vocab_size: int) -> SlotRow:
    no_word_8 = np.full(MAX_BAD_WORD_TOKENS, NO_TOKEN, np.int32)
    no_word_8[-1] = _NOWHERE
    return SlotRow(
        recent=np.full(NUM_RECENT, NO_TOKEN, np.int32),
        output_counts=np.zeros(vocab_size, np.uint16),
        prompt_bits=_pack_bits((), vocab_size),
        allowed_bits=_pack_bits((), vocab_size),
        bias_ids=np.full(MAX_LOGIT_BIAS, _NOWHERE, np.int32),
        bias_values=np.zeros(MAX_LOGIT_BIAS, np.float32),
        bad_words=np.tile(no_word_8, (_MAX_WORDS, 1)),
        stop_ids=np.full(MAX_BANNED_STOPS, _NOWHERE, np.int32),
    )


def _pack_bits(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """A set of tokens as bits: token t is bit t % 32 of word t // 32."""
    is_in_V = np.zeros(-(-vocab_size // _BITS) * _BITS, np.bool_)
    is_in_V[np.asarray(token_ids, np.int64)] = True
    return np.packbits(is_in_V, bitorder="little").view("<u4")


def unpack_bits(bits_SU: Array) -> Array:
    """Bits back to a mask, inside the jit: uint32 [S, U] -> bool [S, 32 U]."""
    shifts_B = jax.lax.iota(jnp.uint32, _BITS)
    mask_SUB = (bits_SU[:, :, None] >> shifts_B) & jnp.uint32(1)
    return mask_SUB.reshape(bits_SU.shape[0], -1) != 0
