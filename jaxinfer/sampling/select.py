"""Choosing a token from processed logits: exact argmax, or top-k / top-p / min-p and a draw.

Pure functions of logits, settings and random bits; knows no slots and no state.

No sort. Each row's weights are `exp((logit - max) / temperature)`, in [0, 1] with the likeliest
token at exactly 1. The bits of non-negative floats order like the floats, so every filter is an
int32 threshold on the bits of the weights, found by a multi-way search over bit patterns; tokens
whose weights are equal stand or fall together. Masses are summed as fixed-point integers, which
add up to the same number in any order: the bucket and the sharding do not decide tokens.

Shapes: S sequences, V width of the logits, B blocks of the vocabulary, H tokens of a block.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.sampling.params import SamplingBatch

_BLOCK = 128
_ONE_BITS = 0x3F800000  # float32 1.0
_EXPONENT_MASK = 0x7F800000  # of a float32's bits
# Masses of a row add up to 2**29 .. 2**30: the sum, with the rounding of V terms, fits an int32,
# and a probability is exact to 2**-30.
_MASS_ONE_BITS = _ONE_BITS + (29 << 23)  # float32 2**29
# Ways the search splits its interval in one pass over the weights: seven sums fuse into one loop
# that XLA:CPU vectorizes, so a pass costs about as much as with one sum and finds three bits.
_NUM_WAYS = 8


class Best(NamedTuple):
    """The likeliest token of each row."""

    token_S: Array  # int32, the lowest id among equals
    logit_S: Array  # float32, NaN if any of the row's logits is


def argmax_tokens(logits_SV: Array) -> Best:
    """Exact argmax. Goes through the maxima of blocks: XLA:CPU's argmax is four times slower."""
    blocks_SBH = _in_blocks(logits_SV, fill=-jnp.inf)
    max_SB = jnp.max(blocks_SBH, axis=2)
    block_S = jnp.argmax(max_SB, axis=1).astype(jnp.int32)
    block_SH = _take_block(blocks_SBH, block_S)
    inside_S = jnp.argmax(block_SH, axis=1).astype(jnp.int32)
    return Best(token_S=block_S * _BLOCK + inside_S, logit_S=jnp.max(max_SB, axis=1))


def top_tokens(logits_SV: Array, num_top: int) -> tuple[Array, Array]:
    """The K largest logits of each row and their ids, largest first, lower id first among equals.

    The K best tokens lie in the K blocks with the best maxima, so only those are searched;
    `lax.top_k` sorts the whole row on some backends and inside conditionals.
    """
    blocks_SBH = _in_blocks(logits_SV, fill=-jnp.inf)
    num_seqs, num_blocks, _ = blocks_SBH.shape
    _, block_SK = _largest(jnp.max(blocks_SBH, axis=2), min(num_top, num_blocks))
    block_SK = jnp.sort(block_SK, axis=1)  # so that candidates stand in the order of their ids
    candidate_SKH = jnp.take_along_axis(blocks_SBH, block_SK[:, :, None], axis=1)
    id_SKH = block_SK[:, :, None] * _BLOCK + lax.iota(jnp.int32, _BLOCK)
    top_SK, index_SK = _largest(candidate_SKH.reshape(num_seqs, -1), num_top)
    return top_SK, jnp.take_along_axis(id_SKH.reshape(num_seqs, -1), index_SK, axis=1)


def _largest(values_SN: Array, num: int) -> tuple[Array, Array]:
    """The `num` largest values of short rows and their indices, by repeated argmax."""
    index_N = lax.iota(jnp.int32, values_SN.shape[1])

    def take_one(is_left_SN: Array, _: None) -> tuple[Array, Array]:
        left_SN = jnp.where(is_left_SN, values_SN, -jnp.inf)
        # Tokens of -inf are taken too, in order: the argmax alone would repeat itself.
        best_S1 = jnp.max(left_SN, axis=1, keepdims=True)
        is_best_SN = is_left_SN & ((values_SN == best_S1) | jnp.isnan(best_S1))
        found_S = jnp.argmax(is_best_SN, axis=1).astype(jnp.int32)
        return is_left_SN & (index_N != found_S[:, None]), found_S

    all_left_SN = jnp.ones(values_SN.shape, jnp.bool_)
    _, found_KS = lax.scan(take_one, all_left_SN, None, length=num)
    found_SK = found_KS.T
    return jnp.take_along_axis(values_SN, found_SK, axis=1), found_SK


def draw_tokens(logits_SV: Array, best: Best, batch: SamplingBatch, bits_S: Array) -> Array:
    """Draws one token a row, int32 [S], by inverse CDF with 32 random bits a row.

    A token outside the filters or of probability below 2**-31 is never drawn. Rows whose best
    logit is not finite give a meaningless token below V.
    """
    scaled_SV = (logits_SV - best.logit_S[:, None]) / batch.temperature[:, None]
    # The best token's weight must be exactly 1 (min_p = 1 keeps it), however exp is approximated.
    weight_SBH = _in_blocks(jnp.where(scaled_SV < 0, jnp.exp(scaled_SV), 1.0), fill=0.0)
    weight_SV = weight_SBH.reshape(weight_SBH.shape[0], -1)
    least_S = lax.bitcast_convert_type(batch.min_p, jnp.int32)
    least_S = lax.cond(
        jnp.any(batch.uses_top_k),
        lambda least_S: _top_k_threshold(weight_SV, batch, least_S),
        lambda least_S: least_S,
        least_S,
    )
    scale_S = _mass_scale(weight_SV, least_S)
    least_S = lax.cond(
        jnp.any(batch.uses_top_p),
        lambda least_S: _top_p_threshold(weight_SV, batch, least_S, scale_S),
        lambda least_S: least_S,
        least_S,
    )
    token_S = _inverse_cdf(weight_SBH, least_S, scale_S, bits_S)
    return jnp.minimum(token_S, logits_SV.shape[1] - 1)


def _top_k_threshold(weight_SV: Array, batch: SamplingBatch, least_S: Array) -> Array:
    """The k-th largest weight's bits. Tokens equal to the k-th stay, as in HF and vLLM."""
    num_S = jnp.minimum(batch.top_k, weight_SV.shape[1])
    found_S = _search(
        weight_SV, None, low_S=jnp.zeros_like(least_S), target_S=num_S, active_S=batch.uses_top_k
    )
    return jnp.maximum(least_S, found_S)


def _top_p_threshold(
    weight_SV: Array, batch: SamplingBatch, least_S: Array, scale_S: Array
) -> Array:
    """Bits of the least weight of the smallest set of mass >= top_p of what is left.

    The token that crosses top_p stays (Holtzman et al., "The curious case of neural text
    degeneration", 2020); so do all tokens equal to it.
    """
    total_S = _sums_at(weight_SV, scale_S, [least_S])[0]
    wanted_S = jnp.ceil(batch.top_p * total_S.astype(jnp.float32)).astype(jnp.int32)
    target_S = jnp.clip(wanted_S, 1, total_S)
    return _search(weight_SV, scale_S, low_S=least_S, target_S=target_S, active_S=batch.uses_top_p)


def _search(
    weight_SV: Array, scale_S: Array | None, *, low_S: Array, target_S: Array, active_S: Array
) -> Array:
    """The largest bits t >= low_S at which the sum over {bits(weight) >= t} reaches target_S.

    The sum at low_S must reach the target, and the target must be positive. Rows that are not
    active give low_S. Stops early where the target is met exactly: a larger t would keep the same
    tokens.
    """
    above_S = jnp.full_like(low_S, _ONE_BITS + 1)

    def is_open(carry: tuple[Array, Array, Array]) -> Array:
        low_S, high_S, sum_S = carry
        return jnp.any(active_S & (high_S - low_S > 1) & (sum_S != target_S))

    def narrow(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low_S, high_S, sum_S = carry
        stride_S = (high_S - low_S + _NUM_WAYS - 1) // _NUM_WAYS
        pivots = [jnp.minimum(low_S + way * stride_S, high_S) for way in range(1, _NUM_WAYS)]
        sums = _sums_at(weight_SV, scale_S, pivots)
        num_passed_S = jnp.zeros_like(low_S)
        for sum_at_S in sums:  # they fall, so those that pass are the first ones
            passed_S = active_S & (sum_at_S >= target_S)
            num_passed_S += passed_S.astype(jnp.int32)
            sum_S = jnp.where(passed_S, sum_at_S, sum_S)
        low_S += num_passed_S * stride_S
        return low_S, jnp.minimum(low_S + stride_S, high_S), sum_S

    return lax.while_loop(is_open, narrow, (low_S, above_S, jnp.zeros_like(low_S)))[0]


def _sums_at(weight_SV: Array, scale_S: Array | None, pivots: list[Array]) -> list[Array]:
    """For each pivot, the mass (or, without scale, the number) of tokens at or above it.

    One variadic reduce, so that the weights are read once for all pivots.
    """
    bits_SV = lax.bitcast_convert_type(weight_SV, jnp.int32)
    units_SV = jnp.ones_like(bits_SV) if scale_S is None else _mass(weight_SV, scale_S[:, None])
    kept = tuple(jnp.where(bits_SV >= pivot_S[:, None], units_SV, 0) for pivot_S in pivots)
    zeros = (jnp.zeros((), jnp.int32),) * len(pivots)

    def add(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return list(lax.reduce(kept, zeros, add, (1,)))


def _mass(weight: Array, scale: Array) -> Array:
    """Fixed-point mass, int32."""
    return jnp.round(weight * scale).astype(jnp.int32)


def _mass_scale(weight_SV: Array, least_S: Array) -> Array:
    """A power of two that brings the row's remaining mass to [2**29, 2**30), float32 [S].

    A power of two, so that the rounding of this one float sum (which depends on its order) does
    not reach the masses.
    """
    bits_SV = lax.bitcast_convert_type(weight_SV, jnp.int32)
    sum_S = jnp.sum(jnp.where(bits_SV >= least_S[:, None], weight_SV, 0.0), axis=1)
    exponent_S = lax.bitcast_convert_type(sum_S, jnp.int32) & _EXPONENT_MASK
    exponent_S -= _ONE_BITS  # unbiased: sum is in [2**e, 2**(e + 1))
    return lax.bitcast_convert_type(_MASS_ONE_BITS - exponent_S, jnp.float32)


def _inverse_cdf(weight_SBH: Array, least_S: Array, scale_S: Array, bits_S: Array) -> Array:
    """The token whose range of the cumulated masses holds the random point. Exact integers."""
    block_mass_SB = jnp.sum(_kept_mass(weight_SBH, least_S[:, None, None], scale_S), axis=2)
    until_SB = jnp.cumsum(block_mass_SB, axis=1)
    point_S = _multiply_high(bits_S, until_SB[:, -1])
    block_S, before_S = _locate(until_SB, point_S)
    inside_SH = _kept_mass(_take_block(weight_SBH, block_S), least_S[:, None], scale_S)
    inside_S, _ = _locate(jnp.cumsum(inside_SH, axis=1), point_S - before_S)
    return block_S * _BLOCK + inside_S


def _kept_mass(weight: Array, least: Array, scale_S: Array) -> Array:
    bits = lax.bitcast_convert_type(weight, jnp.int32)
    return jnp.where(bits >= least, _mass(weight, scale_S.reshape(least.shape)), 0)


def _locate(until_SN: Array, point_S: Array) -> tuple[Array, Array]:
    """The index whose range [until[i-1], until[i]) holds the point, and where the range begins.

    An empty range holds no point, so an item without mass is never found.
    """
    is_before_SN = until_SN <= point_S[:, None]
    index_S = jnp.sum(is_before_SN.astype(jnp.int32), axis=1)
    begin_S = jnp.max(jnp.where(is_before_SN, until_SN, 0), axis=1)
    return jnp.minimum(index_S, until_SN.shape[1] - 1), begin_S


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
