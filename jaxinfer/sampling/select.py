"""Choosing a token from processed logits: exact argmax, or top-k / top-p / min-p and a draw.

Pure functions of logits, settings and random bits; knows no slots and no state.

No sort. Each row's weights are `exp((logit - max) / temperature)`, in [0, 1] with the likeliest
token at exactly 1. Every filter is a threshold on the weights; the bits of non-negative floats
order like the floats, so it is found by a multi-way search over bit patterns. Tokens whose weights
are equal stand or fall together. Masses are summed as fixed-point integers, which
add up to the same number in any order: the bucket and the sharding do not decide tokens.

Shapes: S sequences, V width of the logits, B blocks of the vocabulary, H tokens of a block.
"""

from collections.abc import Callable
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
_LOWEST = float(jnp.finfo(jnp.float32).min)
# Rounds of the filter loop. One loop for all, since XLA compiles what is written twice twice.
_TOP_K, _TOP_P, _SCALE = range(3)


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

    Takes them one by one, each from the block with the best maximum; `lax.top_k` sorts the whole
    row on some backends and inside conditionals. A row that holds a NaN gives meaningless ids.
    """
    blocks_SBH = _in_blocks(logits_SV, fill=-jnp.inf)
    num_seqs, num_blocks, _ = blocks_SBH.shape
    # Logits of -inf count as the lowest float: -inf marks a block that has no token left.
    max_SB = jnp.maximum(jnp.max(blocks_SBH, axis=2), _LOWEST)

    def take_one(
        carry: tuple[Array, Array, Array], _: None
    ) -> tuple[tuple[Array, Array, Array], Array]:
        max_SB, last_S1, last_id_S1 = carry
        block_S = jnp.argmax(max_SB, axis=1).astype(jnp.int32)
        best_S1 = jnp.max(max_SB, axis=1, keepdims=True)
        values_SH = jnp.maximum(_take_block(blocks_SBH, block_S), _LOWEST)
        id_SH = block_S[:, None] * _BLOCK + lax.iota(jnp.int32, _BLOCK)
        # Taken are the larger ones, and the equal ones up to the token taken last.
        is_left_SH = (best_S1 < last_S1) | (id_SH > last_id_S1)
        inside_S = jnp.argmax((values_SH == best_S1) & is_left_SH, axis=1).astype(jnp.int32)
        id_S1 = (block_S * _BLOCK + inside_S)[:, None]
        is_left_SH = (values_SH < best_S1) | ((values_SH == best_S1) & (id_SH > id_S1))
        left_max_S1 = jnp.max(jnp.where(is_left_SH, values_SH, -jnp.inf), axis=1, keepdims=True)
        is_block_SB = lax.iota(jnp.int32, num_blocks) == block_S[:, None]
        return (jnp.where(is_block_SB, left_max_S1, max_SB), best_S1, id_S1), id_S1[:, 0]

    no_value_S1 = jnp.full((num_seqs, 1), jnp.inf, jnp.float32)
    no_id_S1 = jnp.full((num_seqs, 1), -1, jnp.int32)
    _, id_KS = lax.scan(take_one, (max_SB, no_value_S1, no_id_S1), None, length=num_top)
    id_SK = id_KS.T
    return jnp.take_along_axis(logits_SV, id_SK, axis=1, mode="clip"), id_SK


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
    any_top_k, any_top_p = jnp.any(batch.uses_top_k), jnp.any(batch.uses_top_p)
    after_top_k = jnp.where(any_top_p, _TOP_P, _SCALE).astype(jnp.int32)
    top_k_S = jnp.minimum(batch.top_k, weight_SV.shape[1])

    def run_round(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        round_, least_S, _ = carry
        is_top_k = round_ == _TOP_K
        scale_S = _mass_scale(weight_SV, least_S)
        units_SV = jnp.where(is_top_k, 1, _mass(weight_SV, scale_S[:, None]))
        found_S = _search(
            weight_SV,
            units_SV,
            low_S=jnp.where(is_top_k, 0.0, least_S),
            target_of=lambda total_S: jnp.where(
                is_top_k, top_k_S, _share(total_S, batch.top_p)
            ),
            active_S=jnp.where(is_top_k, batch.uses_top_k, batch.uses_top_p & (round_ == _TOP_P)),
        )
        next_round = jnp.where(is_top_k, after_top_k, round_ + 1)
        return next_round, jnp.maximum(least_S, found_S), scale_S

    first_round = jnp.where(any_top_k, _TOP_K, after_top_k).astype(jnp.int32)
    _, least_S, scale_S = lax.while_loop(
        lambda carry: carry[0] <= _SCALE,
        run_round,
        (first_round, batch.min_p, jnp.ones_like(batch.min_p)),
    )
    return least_S, scale_S


def _share(total_S: Array, part_S: Array) -> Array:
    """A part of a mass, rounded up, at least 1."""
    wanted_S = jnp.ceil(part_S * total_S.astype(jnp.float32)).astype(jnp.int32)
    return jnp.clip(wanted_S, 1, total_S)


def _search(
    weight_SV: Array,
    units_SV: Array,
    *,
    low_S: Array,
    target_of: Callable[[Array], Array],
    active_S: Array,
) -> Array:
    """The largest t >= low_S at which the units of the weights >= t add up to the target.

    The target is a function of the units at low_S, positive and not above them. Rows that are not
    active give low_S. Stops early where the target is met exactly: a larger t would keep the same
    tokens.
    """
    num_seqs = weight_SV.shape[0]

    def is_open(state_4S: Array) -> Array:
        low_S, high_S, sum_S, target_S = state_4S
        return jnp.any(active_S & (high_S - low_S > 1) & (sum_S != target_S))

    def narrow(state_4S: Array) -> Array:
        low_S, high_S, sum_S, target_S = state_4S
        # The first pass learns the sum at low_S itself: its first pivot is there.
        is_first_S = (target_S < 0).astype(jnp.int32)
        num_ways_S = _NUM_WAYS - is_first_S
        stride_S = lax.div(high_S - low_S + num_ways_S - 1, num_ways_S)
        pivots = [
            jnp.minimum(low_S + (way - is_first_S) * stride_S, high_S)
            for way in range(1, _NUM_WAYS)
        ]
        sums = _sums_at(weight_SV, units_SV, pivots)
        target_S = jnp.where(target_S < 0, target_of(sums[0]), target_S)
        num_passed_S = -is_first_S
        for sum_at_S in sums:  # they fall, so those that pass are the first ones
            passed_S = sum_at_S >= target_S
            num_passed_S += passed_S.astype(jnp.int32)
            sum_S = jnp.where(passed_S, sum_at_S, sum_S)
        new_low_S = low_S + num_passed_S * stride_S
        return jnp.stack([new_low_S, jnp.minimum(new_low_S + stride_S, high_S), sum_S, target_S])

    low_S = lax.bitcast_convert_type(low_S, jnp.int32)
    above_S = jnp.full((num_seqs,), _ONE_BITS + 1, jnp.int32)
    unknown_S = jnp.full((num_seqs,), -1, jnp.int32)
    start_4S = jnp.stack([low_S, above_S, jnp.zeros_like(low_S), unknown_S])
    found_S = jnp.where(active_S, lax.while_loop(is_open, narrow, start_4S)[0], low_S)
    return lax.bitcast_convert_type(found_S, jnp.float32)


def _sums_at(weight_SV: Array, units_SV: Array, pivots: list[Array]) -> list[Array]:
    """For each pivot (the bits of a weight), the units of the weights at or above it.

    One variadic reduce, so that the weights are read once for all pivots.
    """
    least = [lax.bitcast_convert_type(pivot_S, jnp.float32)[:, None] for pivot_S in pivots]
    kept = tuple(jnp.where(weight_SV >= least_S1, units_SV, 0) for least_S1 in least)
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
    sum_S = jnp.sum(jnp.where(weight_SV >= least_S[:, None], weight_SV, 0.0), axis=1)
    exponent_S = lax.bitcast_convert_type(sum_S, jnp.int32) & _EXPONENT_MASK
    exponent_S -= _ONE_BITS  # unbiased: sum is in [2**e, 2**(e + 1))
    return lax.bitcast_convert_type(_MASS_ONE_BITS - exponent_S, jnp.float32)


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

    block_mass_SB = jnp.sum(kept_mass(weight_SBH), axis=2)
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
