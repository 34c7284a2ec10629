"""Weighs the partial results of each sequence's splits into its attention output (Mosaic GPU).

Knows partial results only: normalised outputs and log2 of their sums of weights, those of a
sequence one after the other (gpu_decode.py). One warpgroup makes `LANES` elements of a kv head's
output for one sequence, which is half a query head, one, or two.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.paged_attention.gpu_mosaic import LOG2_E, MASKED, Ref

LANES = 128
UNROLL = 8  # partial results whose loads are in flight together


def combine(
    partial_NKGH: Array,
    log_sum_NKX: Array,
    starts_S1: Array,
    sinks_KG: Array | None,
    *,
    consumers: int,
    dtype: DTypeLike,
    interpret: Any = None,
) -> Array:
    """[S, K, G, H] from the partial results; zeros for a sequence without any.

    `starts_S1`: first split of each sequence, `consumers` partial results a split. A sink takes
    part in the sum of weights once.
    """
    num_heads, group, head_dim = partial_NKGH.shape[1:]
    num_seqs = starts_S1.shape[0] - 1
    length = group * head_dim
    padded = -(-length // LANES) * LANES  # more than `length` for one query head of 64
    partial_NKL = partial_NKGH.reshape(-1, num_heads, length)
    partial_NKL = jnp.pad(partial_NKL, ((0, 0), (0, 0), (0, padded - length)))
    if sinks_KG is None:
        sinks_KG = jnp.full((num_heads, group), MASKED, jnp.float32)
    else:
        sinks_KG = sinks_KG.astype(jnp.float32) * LOG2_E
    out_SKL = plgpu.kernel(
        partial(_combine_body, group=group, head_dim=head_dim, is_simulated=interpret is not None),
        out_type=jax.ShapeDtypeStruct((num_seqs, num_heads, padded), dtype),
        grid=(num_seqs, num_heads, padded // LANES),
        grid_names=("seq", "head", "chunk"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(partial_NKL, log_sum_NKX, consumers * starts_S1, sinks_KG)
    return out_SKL[:, :, :length].reshape(num_seqs, num_heads, group, head_dim)


def _combine_body(
    partial_ref: Ref,
    log_sum_ref: Ref,
    starts_ref: Ref,
    sinks_ref: Ref,
    out_ref: Ref,
    *,
    group: int,
    head_dim: int,
    is_simulated: bool,
) -> None:
    seq, head, chunk = (lax.axis_index(name) for name in ("seq", "head", "chunk"))
    first, end = starts_ref[seq], starts_ref[seq + 1]
    turns = (end - first + UNROLL - 1) // UNROLL
    lanes = pl.ds(chunk * LANES, LANES)
    # The query heads of these lanes: one, or two when a head is shorter than the lanes.
    queries = [
        jnp.minimum((chunk * LANES + lane) // head_dim, group - 1)
        for lane in range(0, LANES, min(head_dim, LANES))
    ]
    by_lane = partial(_one_element_a_thread, is_simulated=is_simulated)
    lane_L = by_lane(lax.broadcasted_iota(jnp.int32, (LANES,), 0))

    def places(turn: Array) -> list[Array]:
        return [first + turn * UNROLL + offset for offset in range(UNROLL)]

    def take_max(turn: Array, largest: tuple[Array, ...]) -> tuple[Array, ...]:
        rows = [jnp.minimum(place, end - 1) for place in places(turn)]
        for row in rows:
            largest = tuple(
                jnp.maximum(so_far, log_sum_ref[row, head, query])
                for so_far, query in zip(largest, queries, strict=True)
            )
        return largest

    sinks = tuple(sinks_ref[head, query] for query in queries)
    largest = lax.fori_loop(0, turns, take_max, sinks)

    def take(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        acc_L, sum_L = carry
        for place in places(turn):
            row = jnp.minimum(place, end - 1)
            weights = [
                jnp.where(place < end, jnp.exp2(log_sum_ref[row, head, query] - top), 0.0)
                for query, top in zip(queries, largest, strict=True)
            ]
            weight_L = _by_head(weights, lane_L, head_dim)
            acc_L += weight_L * partial_ref[row, head, lanes]
            sum_L += weight_L
        return acc_L, sum_L

    sink_weights = [jnp.exp2(sink - top) for sink, top in zip(sinks, largest, strict=True)]
    init_L = jnp.zeros((LANES,), jnp.float32), _by_head(sink_weights, lane_L, head_dim)
    acc_L, sum_L = lax.fori_loop(0, turns, take, (by_lane(init_L[0]), by_lane(init_L[1])))
    out_ref[seq, head, lanes] = (acc_L / sum_L).astype(out_ref.dtype)


def _by_head(scalars: list[Array], lane_L: Array, head_dim: int) -> Array:
    """A vector of the lanes, each with the number of its head."""
    vector_L = jnp.broadcast_to(scalars[0], lane_L.shape)
    for index, scalar in enumerate(scalars[1:], start=1):
        vector_L = jnp.where(lane_L >= index * head_dim, scalar, vector_L)
    return vector_L


def _one_element_a_thread(vector_L: Array, *, is_simulated: bool) -> Array:
    if is_simulated:
        return vector_L
    return plgpu.layout_cast(vector_L, plgpu.Layout.WG_STRIDED((LANES,), vec_size=1))
