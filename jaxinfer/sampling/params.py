"""One sequence's sampling settings as a row of 32-bit words, packed on the host, read in the jit.

Knows the row's layout and nothing else: no logits, no slots' device state. The runner keeps an
int32 table of one row per slot, gathers the rows of a step (`step_words`) into its one packed
transfer, and the jitted step reads them back with `unpack_sampling`. Both sides use `_FIELDS`.

Shapes: S sequences of the step's bucket, R slots (max_num_seqs), W words of a row.
"""

import enum
from functools import cache
from typing import NamedTuple

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


_THREEFRY_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class _Flag(enum.IntFlag):
    """What a sequence needs of the step; everything a batch does not need is skipped."""

    RANDOM = enum.auto()
    PENALTIES = enum.auto()
    BIAS = enum.auto()
    ALLOWED = enum.auto()
    BAD_WORDS = enum.auto()
    LOGPROBS = enum.auto()


class SamplingBatch(NamedTuple):
    """The sampling settings of a step's sequences: [S] arrays, and what any row uses.

    Read from the packed words where they are used: as one array they pass into the branches of a
    conditional at the cost of one operand, and each branch's loops decode them on the way.

    A row that samples nothing (padding, or a prompt that is not finished) has a slot outside the
    device state, so that its updates are dropped, and no flag.
    """

    words_SW: Array  # int32

    def _column(self, name: str) -> Array:
        column = _COLUMN[name]
        dtype = jnp.dtype(_FIELDS[column][1])
        return lax.bitcast_convert_type(self.words_SW[:, column], dtype)

    def _has(self, flag: _Flag) -> Array:
        return (self._column("flags") & int(flag)) != 0

    @property
    def slot(self) -> Array:
        """int32."""
        return self._column("slot")

    @property
    def output_index(self) -> Array:
        """int32: the position in the output of the token to sample."""
        return self._column("output_index")

    @property
    def temperature(self) -> Array:
        """float32, above 0."""
        return self._column("temperature")

    @property
    def top_k(self) -> Array:
        """int32, NO_TOP_K for all."""
        return self._column("top_k")

    @property
    def top_p(self) -> Array:
        """float32."""
        return self._column("top_p")

    @property
    def min_p(self) -> Array:
        """float32."""
        return self._column("min_p")

    @property
    def presence_penalty(self) -> Array:
        """float32."""
        return self._column("presence_penalty")

    @property
    def frequency_penalty(self) -> Array:
        """float32."""
        return self._column("frequency_penalty")

    @property
    def repetition_penalty(self) -> Array:
        """float32."""
        return self._column("repetition_penalty")

    @property
    def seed(self) -> tuple[Array, Array]:
        """The high and the low word, uint32."""
        return self._column("seed_high"), self._column("seed_low")

    @property
    def is_random(self) -> Array:
        """bool; the others are greedy."""
        return self._has(_Flag.RANDOM)

    @property
    def use_penalties(self) -> Array:
        """bool."""
        return self._has(_Flag.PENALTIES)

    @property
    def use_bias(self) -> Array:
        """bool."""
        return self._has(_Flag.BIAS)

    @property
    def use_allowed(self) -> Array:
        """bool."""
        return self._has(_Flag.ALLOWED)

    @property
    def use_bad_words(self) -> Array:
        """bool."""
        return self._has(_Flag.BAD_WORDS)

    @property
    def wants_logprobs(self) -> Array:
        """bool."""
        return self._has(_Flag.LOGPROBS)

    @property
    def ban_stop(self) -> Array:
        """bool: below min_tokens, so no stop token may come."""
        return self.output_index < self._column("min_tokens")

    @property
    def uses_top_k(self) -> Array:
        """bool."""
        return self.is_random & (self.top_k != NO_TOP_K)

    @property
    def uses_top_p(self) -> Array:
        """bool."""
        return self.is_random & (self.top_p < 1.0)

    @property
    def changes_some(self) -> Array:
        """bool: the logits of listed tokens are changed before sampling."""
        return self.use_bad_words | self.ban_stop | self.use_bias

    @property
    def changes_all(self) -> Array:
        """bool: the logits of any token may be changed before sampling (temperature aside)."""
        return self.use_allowed | self.use_penalties


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
    return SamplingBatch(words_SW)


def random_bits(batch: SamplingBatch) -> Array:
    """One 32-bit random word a row, uint32 [S]: a function of the row's seed and output index.

    Counter based, so a token never depends on the slot, the bucket or the neighbours of its
    sequence.
    """
    index_S = lax.bitcast_convert_type(batch.output_index, jnp.uint32)
    return threefry_2x32(batch.seed, (index_S, jnp.zeros_like(index_S)))[0]


def threefry_2x32(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds, on uint32 arrays of one shape.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. Written out, because that
    compiles to one loop; `jax.random` makes fifteen of it.
    """
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    left, right = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for distance in _THREEFRY_ROTATIONS[group % 2]:
            left = left + right
            right = left ^ (right << distance | right >> (32 - distance))
        left = left + keys[(group + 1) % 3]
        right = right + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return left, right


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


@cache
def _idle_row(max_num_seqs: int) -> np.ndarray:
    """A greedy row without flags whose slot is outside the state; read-only."""
    row_W = pack_sampling(SamplingParams(temperature=0.0), default_seed=0)
    row_W[_COLUMN["slot"]] = max_num_seqs
    row_W.setflags(write=False)
    return row_W
