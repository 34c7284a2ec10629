"""One sequence's sampling settings as a row of 32-bit words, packed on the host, read in the jit.

Knows the row's layout and nothing else: no logits, no slots' device state. The runner keeps an
int32 table of one row per slot, gathers the rows of a step (`step_words`) into its one packed
transfer, and the jitted step reads them back with `unpack_sampling`. Both sides use `_FIELDS`.

Shapes: S sequences of the step's bucket, R slots (max_num_seqs), W words of a row.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxinfer.core.sampling_params import SamplingParams

_FIELDS: tuple[tuple[str, type[np.generic]], ...] = (
    ("slot", np.int32),
    ("output_index", np.int32),
    ("flags", np.int32),
    ("temperature", np.float32),
    ("top_k", np.int32),
    ("top_p", np.float32),
    ("min_p", np.float32),
    ("presence_penalty", np.float32),
    ("frequency_penalty", np.float32),
    ("repetition_penalty", np.float32),
    ("min_tokens", np.int32),
    ("seed_high", np.uint32),
    ("seed_low", np.uint32),
)
_COLUMN = {name: column for column, (name, _) in enumerate(_FIELDS)}

NUM_WORDS = len(_FIELDS)
"""W: int32 words of a row."""

NO_TOP_K = 2**31 - 1
"""top_k of a row that keeps all tokens."""


class _Flag(enum.IntFlag):
    """What a sequence needs of the step; everything a batch does not need is skipped."""

    RANDOM = enum.auto()
    PENALTIES = enum.auto()
    BIAS = enum.auto()
    ALLOWED = enum.auto()
    BAD_WORDS = enum.auto()
    LOGPROBS = enum.auto()


class SamplingBatch(NamedTuple):
    """The sampling settings of a step's sequences: arrays of shape [S], and what any row uses.

    A row that samples nothing (padding, or a prompt that is not finished) has a slot outside the
    device state, so that its updates are dropped, and no flag.
    """

    slot: Array  # int32
    output_index: Array  # int32, position in the output of the token to sample
    temperature: Array  # float32, > 0
    top_k: Array  # int32, NO_TOP_K for all
    top_p: Array  # float32
    min_p: Array  # float32
    presence_penalty: Array  # float32
    frequency_penalty: Array  # float32
    repetition_penalty: Array  # float32
    seed: Array  # uint32 [S, 2], high word first
    is_random: Array  # bool; the others are greedy
    use_penalties: Array  # bool
    use_bias: Array  # bool
    use_allowed: Array  # bool
    use_bad_words: Array  # bool
    ban_stop: Array  # bool: below min_tokens, so no stop token may come
    wants_logprobs: Array  # bool

    @property
    def any_random(self) -> Array:
        return jnp.any(self.is_random)

    @property
    def any_processor(self) -> Array:
        """Whether the logits of any row are changed before sampling (temperature aside)."""
        changed_S = self.use_penalties | self.use_bias | self.use_allowed
        return jnp.any(changed_S | self.use_bad_words | self.ban_stop)

    @property
    def uses_top_k(self) -> Array:
        return self.is_random & (self.top_k != NO_TOP_K)

    @property
    def uses_top_p(self) -> Array:
        return self.is_random & (self.top_p < 1.0)


def pack_sampling(params: SamplingParams, *, default_seed: int) -> np.ndarray:
    """Packs what does not change from step to step: int32 [W].

    `default_seed` (any integer; its low 64 bits count) is the seed of a request that gives none;
    give each request its own.
    """
    seed = default_seed if params.seed is None else params.seed
    values = {
        "flags": int(_flags(params)),
        "temperature": 1.0 if params.is_greedy else params.temperature,
        "top_k": params.top_k if params.top_k > 0 else NO_TOP_K,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "min_tokens": params.min_tokens,
        "seed_high": seed >> 32 & 0xFFFFFFFF,
        "seed_low": seed & 0xFFFFFFFF,
    }
    row_W = np.zeros(NUM_WORDS, np.int32)
    for name, dtype in _FIELDS:
        if name in values:
            row_W[_COLUMN[name]] = np.asarray(values[name], dtype).view(np.int32)
    return row_W


def step_words(
    table_RW: np.ndarray,
    *,
    slots_S: np.ndarray,
    output_indices_S: np.ndarray,
    samples_S: np.ndarray,
) -> np.ndarray:
    """Gathers a step's rows from the table of all slots: int32 [S, W].

    Rows where `samples_S` is False (padding, prompts that go on) become idle rows, whatever their
    slot says.
    """
    max_num_seqs = table_RW.shape[0]
    words_SW = table_RW[np.where(samples_S, slots_S, 0)]
    words_SW[:, _COLUMN["slot"]] = slots_S
    words_SW[:, _COLUMN["output_index"]] = output_indices_S
    words_SW[~samples_S.astype(bool)] = _idle_row(max_num_seqs)
    return words_SW


def unpack_sampling(words_SW: Array) -> SamplingBatch:
    """Reads the rows back, inside the jit. Inverse of `pack_sampling` and `step_words`."""
    column = {
        name: lax.bitcast_convert_type(words_SW[:, i], jnp.dtype(dtype))
        for i, (name, dtype) in enumerate(_FIELDS)
    }
    flags_S = column.pop("flags")
    min_tokens_S = column.pop("min_tokens")
    seed_S2 = jnp.stack([column.pop("seed_high"), column.pop("seed_low")], axis=1)

    def has(flag: _Flag) -> Array:
        return (flags_S & int(flag)) != 0

    return SamplingBatch(
        **column,
        seed=seed_S2,
        is_random=has(_Flag.RANDOM),
        use_penalties=has(_Flag.PENALTIES),
        use_bias=has(_Flag.BIAS),
        use_allowed=has(_Flag.ALLOWED),
        use_bad_words=has(_Flag.BAD_WORDS),
        ban_stop=column["output_index"] < min_tokens_S,
        wants_logprobs=has(_Flag.LOGPROBS),
    )


def random_bits(batch: SamplingBatch) -> Array:
    """One 32-bit random word a row, uint32 [S]: a function of the row's seed and output index.

    Counter based (Threefry; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
    so a token never depends on the slot, the bucket or the neighbours of its sequence.
    """

    def bits_of(seed_2: Array, output_index: Array) -> Array:
        key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, output_index), dtype=jnp.uint32)

    return jax.vmap(bits_of)(batch.seed, batch.output_index)


def _flags(params: SamplingParams) -> _Flag:
    wanted = {
        _Flag.RANDOM: not params.is_greedy,
        _Flag.PENALTIES: params.has_penalties,
        _Flag.BIAS: bool(params.logit_bias),
        _Flag.ALLOWED: params.allowed_token_ids is not None,
        _Flag.BAD_WORDS: bool(params.bad_words_token_ids),
        _Flag.LOGPROBS: params.logprobs is not None,
    }
    flags = _Flag(0)
    for flag, is_wanted in wanted.items():
        if is_wanted:
            flags |= flag
    return flags


def _idle_row(max_num_seqs: int) -> np.ndarray:
    """A greedy row without flags whose slot is outside the state."""
    row_W = pack_sampling(SamplingParams(temperature=0.0), default_seed=0)
    row_W[_COLUMN["slot"]] = max_num_seqs
    return row_W
