"""Choosing a token from processed logits: exact argmax, or top-k / top-p / min-p and a draw.

Pure functions of logits, settings and random bits; knows no slots and no state.

No sort. Each row's weights are `exp((logit - max) / temperature)`, in [0, 1] with the likeliest
token at exactly 1. Every filter is a threshold on the weights; the bits of non-negative floats
order like the floats, so it is found by a multi-way search over bit patterns. Tokens whose weights
are equal stand or fall together. Masses are summed as fixed-point integers, which
add up to the same number in any order: the bucket and the sharding do not decide tokens.

Shapes: S sequences, V width of the logits, B blocks of the vocabulary, H tokens of a block.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.sampling.params import SamplingBatch

_BLOCK = 256
_ONE_BITS = 0x3F800000  # float32 1.0
_LOWEST = float(jnp.finfo(jnp.float32).min)
_EXPONENT_MASK = 0x7F800000  # of a float32's bits
# Masses of a row add up to 2**29 .. 2**30: the sum, with the rounding of V terms, fits an int32,
# and a probability is exact to 2**-30.
_MASS_ONE_BITS = _ONE_BITS + (29 << 23)  # float32 2**29
# The search splits its interval in four in one pass over the weights: three sums fuse into one
# loop that XLA:CPU vectorizes, so a pass costs little more than with one sum and finds two bits of
# the 30 that tell the weights from 0 to 1 apart.
_BITS_PER_PASS = 2
_NUM_PASSES = 15
# Rounds of the filter loop. One loop for both, since XLA compiles what is written twice twice.
_TOP_K, _TOP_P = range(2)


class Best(NamedTuple):
    """The likeliest token of each row."""

    token_S: Array  # int32, the lowest id among equals
    logit_S: Array  # float32, NaN if any of the row's logits is


def argmax_tokens(logits_SV: Array) -> Best:
    """Exact argmax, on a CPU through the maxima of blocks: its own argmax is four times slower.

    XLA makes one pass over the logits of the other form, wherever they lie (decisions/0016).
    """
    return lax.platform_dependent(logits_SV, cpu=_argmax_of_blocks, default=_argmax)


def _argmax(logits_SV: Array) -> Best:
    return Best(token_S=lax.argmax(logits_SV, 1, jnp.int32), logit_S=jnp.max(logits_SV, axis=1))


def _argmax_of_blocks(logits_SV: Array) -> Best:
    blocks_SBH = _in_blocks(logits_SV, fill=-jnp.inf)
    max_SB = jnp.max(blocks_SBH, axis=2)
    block_S = jnp.argmax(max_SB, axis=1).astype(jnp.int32)
    block_SH = _take_block(blocks_SBH, block_S)
    inside_S = jnp.argmax(block_SH, axis=1).astype(jnp.int32)
    return Best(token_S=block_S * _BLOCK + inside_S, logit_S=jnp.max(max_SB, axis=1))


def top_tokens(logits_SV: Array, num_top: int) -> Array:
    """The ids of the K largest logits, int32 [S, K], largest first, lower id first among equals.

    Takes them one by one, each from the block with the best maximum; `lax.top_k` sorts the whole
    row on some backends and inside conditionals. A row that holds a NaN gives meaningless ids.
    """
    blocks_SBH = _in_blocks(logits_SV, fill=-jnp.inf)
    num_seqs, num_blocks, _ = blocks_SBH.shape
    # Logits of -inf count as the lowest float: -inf marks a block that has no token left.
    max_SB = jnp.maximum(jnp.max(blocks_SBH, axis=2), _LOWEST)

    def take_one(
        rank: Array, carry: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, Array, Array, Array]:
        max_SB, id_SK, last_S, last_id_S = carry
        block_S = jnp.argmax(max_SB, axis=1).astype(jnp.int32)
        value_SH = jnp.maximum(_take_block(blocks_SBH, block_S), _LOWEST)
        inside_SH = lax.broadcasted_iota(jnp.int32, value_SH.shape, 1)
        # Taken are the larger ones, and the equal ones up to the token taken last.
        id_SH = block_S[:, None] * _BLOCK + inside_SH
        is_equal_left_SH = (value_SH == last_S[:, None]) & (id_SH > last_id_S[:, None])
        is_left_SH = (value_SH < last_S[:, None]) | is_equal_left_SH
        best_S, id_S, next_S = _best_two(jnp.where(is_left_SH, value_SH, -jnp.inf), id_SH)
        is_block_SB = lax.iota(jnp.int32, num_blocks) == block_S[:, None]
        max_SB = jnp.where(is_block_SB, next_S[:, None], max_SB)
        id_SK = jnp.where(lax.iota(jnp.int32, num_top) == rank, id_S[:, None], id_SK)
        return max_SB, id_SK, best_S, id_S

    no_id_SK = jnp.zeros((num_seqs, num_top), jnp.int32)
    no_value_S, no_id_S = jnp.full((num_seqs,), jnp.inf, jnp.float32), no_id_SK[:, 0]
    return lax.fori_loop(0, num_top, take_one, (max_SB, no_id_SK, no_value_S, no_id_S))[1]


def _best_two(value_SH: Array, id_SH: Array) -> tuple[Array, Array, Array]:
    """Each row's largest value, its lowest id, and the largest of the other values."""

    def join(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
        is_left = (left[0] > right[0]) | ((left[0] == right[0]) & (left[1] < right[1]))
        next_value = jnp.maximum(left[2], right[2])
        return (
            jnp.where(is_left, left[0], right[0]),
            jnp.where(is_left, left[1], right[1]),
            jnp.maximum(next_value, jnp.where(is_left, right[0], left[0])),
        )

    nothing = (jnp.float32(-jnp.inf), jnp.int32(jnp.iinfo(jnp.int32).max), jnp.float32(-jnp.inf))
    best_S, id_S, next_S = lax.reduce(
        (value_SH, id_SH, jnp.full_like(value_SH, -jnp.inf)), nothing, join, (1,)
    )
    return best_S, id_S, next_S


def draw_tokens(logits_SV: Array, best: Best, batch: SamplingBatch, bits_S: Array) -> Array:
    """Draws one token a row, int32 [S], by inverse CDF with 32 random bits a row.

    A token outside the filters or of probability below 2**-31 is never drawn. Rows whose best
    logit is not finite give a meaningless token below V.
    """
    scaled_SV = (logits_SV - best.logit_S[:, None]) / batch.temperature[:, None]
    # The best token's weight must be exactly 1 (min_p = 1 keeps it), however exp is approximated.
    weight_SBH = _in_blocks(jnp.where(scaled_SV < 0, jnp.exp(scaled_SV), 1.0), fill=0.0)
    least_S, scale_S = _filter(weight_SBH.reshape(weight_SBH.shape[0], -1), batch)
    token_S = _inverse_cdf(weight_SBH, least_S, scale_S, bits_S)
    return jnp.minimum(token_S, logits_SV.shape[1] - 1)


def _filter(weight_SV: Array, batch: SamplingBatch) -> tuple[Array, Array]:
    """The least weight that is kept, and the scale of the masses of what is kept; float32 [S].

    min_p is such a weight itself. top_k keeps all tokens equal to the k-th, as HF and vLLM do.
    top_p keeps the smallest set of mass >= top_p of what is left, with the token that crosses
    top_p (Holtzman et al., "The curious case of neural text degeneration", 2020) and its equals.
    """

    def run_round(round_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        least_S, scale_S = carry
        is_top_k = round_ == _TOP_K
        units_SV = jnp.where(is_top_k, 1, _mass(weight_SV, scale_S[:, None]))
        least_S = _search(weight_SV, units_SV, least_S, batch, is_top_k=is_top_k)
        return least_S, _mass_scale(weight_SV, least_S)

    return lax.fori_loop(
        jnp.where(jnp.any(batch.uses_top_k), _TOP_K, _TOP_P),
        jnp.where(jnp.any(batch.uses_top_p), _TOP_P + 1, _TOP_P),
        run_round,
        (batch.min_p, _mass_scale(weight_SV, batch.min_p)),
    )


def _share(total_S: Array, part_S: Array) -> Array:
    """A part of a mass, rounded up, at least 1."""
    wanted_S = jnp.ceil(part_S * total_S.astype(jnp.float32)).astype(jnp.int32)
    return jnp.clip(wanted_S, 1, total_S)


def _search(
    weight_SV: Array, units_SV: Array, least_S: Array, batch: SamplingBatch, *, is_top_k: Array
) -> Array:
    """The least weight that stays: least_S, or a larger one that top_k (else top_p) sets.

    That is the largest t at which the units of the weights >= t are at least top_k, or at least
    top_p of the units of those >= least_S. Stops early where they are exactly that: a larger t
    would keep the same tokens.
    """

    def is_open(state_4S: Array) -> Array:
        pass_S, _, sum_S, target_S = state_4S
        return jnp.any((pass_S <= _NUM_PASSES) & (sum_S != target_S))

    def narrow(state_4S: Array) -> Array:
        pass_S, low_S, sum_S, target_S = state_4S
        # Pass 0 learns the mass at low_S: all its pivots are there. So are those of closed rows.
        is_moving_S = (pass_S > 0) & (pass_S <= _NUM_PASSES)
        shift_S = _BITS_PER_PASS * (_NUM_PASSES - pass_S)
        stride_S = jnp.where(is_moving_S, 1 << shift_S.clip(min=0), 0)
        pivots = [low_S + way * stride_S for way in range(1, 1 << _BITS_PER_PASS)]
        sums = _sums_at(weight_SV, units_SV, [_as_float(pivot_S) for pivot_S in pivots])
        target_S = jnp.where(pass_S == 0, _share(sums[0], batch.top_p), target_S)
        for sum_at_S in sums:  # they fall, so those that pass are the first ones
            is_passed_S = sum_at_S >= target_S
            low_S += jnp.where(is_passed_S, stride_S, 0)
            sum_S = jnp.where(is_passed_S, sum_at_S, sum_S)
        return jnp.stack([pass_S + 1, low_S, sum_S, target_S])

    is_active_S = jnp.where(is_top_k, batch.uses_top_k, batch.uses_top_p)
    pass_S = jnp.where(is_active_S, jnp.where(is_top_k, 1, 0), _NUM_PASSES + 1)
    low_S = jnp.where(is_active_S & is_top_k, 0, _as_bits(least_S))
    target_S = jnp.where(is_top_k, jnp.minimum(batch.top_k, weight_SV.shape[1]), -1)
    # One array: each of several would be updated by a loop of its own.
    start_4S = jnp.stack([pass_S, low_S, jnp.zeros_like(low_S), target_S])
    found_S = _as_float(lax.while_loop(is_open, narrow, start_4S)[1])
    return jnp.maximum(least_S, found_S)


def _sums_at(weight_SV: Array, units_SV: Array, pivots: list[Array]) -> list[Array]:
    """For each pivot, the units of the weights at or above it.

    One variadic reduce, so that the weights are read once for all pivots.
    """
    kept = tuple(jnp.where(weight_SV >= pivot_S[:, None], units_SV, 0) for pivot_S in pivots)
    zeros = (jnp.zeros((), jnp.int32),) * len(pivots)

    def add(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return list(lax.reduce(kept, zeros, add, (1,)))


def _as_bits(value: Array) -> Array:
    return lax.bitcast_convert_type(value, jnp.int32)


def _as_float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _mass(weight: Array, scale: Array) -> Array:
    """Fixed-point mass, int32."""
    return jnp.round(weight * scale).astype(jnp.int32)


def _mass_scale(weight_SV: Array, least_S: Array) -> Array:
    """A power of two that brings the row's remaining mass to [2**29, 2**30), float32 [S].

    A power of two, so that the rounding of this one float sum (which depends on its order) does
    not reach the masses.
    """
    sum_S = jnp.sum(jnp.where(weight_SV >= least_S[:, None], weight_SV, 0.0), axis=1)
    exponent_S = (_as_bits(sum_S) & _EXPONENT_MASK) - _ONE_BITS  # sum is in [2**e, 2**(e + 1))
    return _as_float(_MASS_ONE_BITS - exponent_S)


def _inverse_cdf(weight_SBH: Array, least_S: Array, scale_S: Array, bits_S: Array) -> Array:
    """The token whose range of the cumulated masses holds the random point. Exact integers.

    Two rounds of one loop: the block, then the token inside it.
    """
    num_blocks = weight_SBH.shape[1]
    width = max(num_blocks, _BLOCK)

    def kept_mass(weight: Array) -> Array:
        shape = (-1,) + (1,) * (weight.ndim - 1)
        mass = _mass(weight, scale_S.reshape(shape))
        return jnp.where(weight >= least_S.reshape(shape), mass, 0)

    def widen(mass_SN: Array) -> Array:
        return jnp.pad(mass_SN, ((0, 0), (0, width - mass_SN.shape[1])))

    def descend(round_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mass_SN, token_S, point_S = carry
        until_SN = jnp.cumsum(mass_SN, axis=1)
        point_S = jnp.where(round_ == 0, _multiply_high(bits_S, until_SN[:, -1]), point_S)
        index_S, begin_S = _locate(until_SN, point_S)
        inside_SH = kept_mass(_take_block(weight_SBH, jnp.minimum(index_S, num_blocks - 1)))
        return widen(inside_SH), token_S * _BLOCK + index_S, point_S - begin_S

    # Sums of 32 and fewer are one loop each to XLA:CPU.
    mass_SBJI = kept_mass(weight_SBH).reshape(*weight_SBH.shape[:2], -1, 32)
    block_mass_SB = jnp.sum(jnp.sum(mass_SBJI, axis=3), axis=2)
    nothing_S = jnp.zeros_like(bits_S, jnp.int32)
    return lax.fori_loop(0, 2, descend, (widen(block_mass_SB), nothing_S, nothing_S))[1]


def _locate(until_SN: Array, point_S: Array) -> tuple[Array, Array]:
    """The index whose range [until[i-1], until[i]) holds the point, and where the range begins.

    An empty range holds no point, so an item without mass is never found.
    """
    is_before_SN = until_SN <= point_S[:, None]

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] + right[0], jnp.maximum(left[1], right[1])

    zero = jnp.zeros((), jnp.int32)
    return lax.reduce(
        (is_before_SN.astype(jnp.int32), jnp.where(is_before_SN, until_SN, 0)),
        (zero, zero),
        join,
        (1,),
    )


def _multiply_high(bits_S: Array, total_S: Array) -> Array:
    """floor(bits * total / 2**32) for uint32 bits and int32 total >= 0, in 32-bit arithmetic.

    Maps random bits to [0, total) (Lemire, "Fast random integer generation in an interval", 2019).
    """
    total_S = total_S.astype(jnp.uint32)
    low_S, high_S = bits_S & 0xFFFF, bits_S >> 16
    total_low_S, total_high_S = total_S & 0xFFFF, total_S >> 16
    middle_S = high_S * total_low_S + (low_S * total_low_S >> 16)
    carry_S = (middle_S & 0xFFFF) + low_S * total_high_S
    return (high_S * total_high_S + (middle_S >> 16) + (carry_S >> 16)).astype(jnp.int32)


def _in_blocks(values_SV: Array, *, fill: float) -> Array:
    """[S, V] -> [S, B, H], padded with `fill` to whole blocks."""
    num_seqs, width = values_SV.shape
    num_blocks = -(-width // _BLOCK)
    padding = ((0, 0), (0, num_blocks * _BLOCK - width))
    return jnp.pad(values_SV, padding, constant_values=fill).reshape(num_seqs, num_blocks, _BLOCK)


def _take_block(values_SBH: Array, block_S: Array) -> Array:
    return jnp.take_along_axis(values_SBH, block_S[:, None, None], axis=1)[:, 0]
