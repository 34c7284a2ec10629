"""Ragged paged attention in Pallas' Triton dialect: GPUs without a kernel made for them.

See api.PagedAttention. Older and newer NVIDIA cards than Hopper, and AMD's, as long as JAX keeps
the dialect (deprecated since 0.11). Knows the work lists of gpu_work.py.

One body serves decodes and prefill chunks: a program holds a tile of rows (query, query head of
the kv head), walks over blocks of keys with an online softmax (gpu_mosaic.py says whose), and loads
keys and values by gathering rows of pages, so any page size will do. Loads and stores are masked,
so nothing is read that was not written and no row is stored that is not the block's own.
A decode's keys are split over programs; `_combine_body` weighs their partial results.
Pages of uint8 are the bits of float8_e4m3fn, for devices without that type.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.paged_attention.api import AttentionSpec, StepLayout
from pallas_kernels.paged_attention.gpu_work import DecodeSplits, PrefillBlocks
from pallas_kernels.paged_attention.quantized import from_fp8_bits

MIN_ROWS = 16  # of a tile: the least that tensor cores multiply
PREFILL_ROWS = 64
MASKED = -1e30
LOG2_E = 1.4426950408889634

Ref = Any  # references have no public type


class Tiling(NamedTuple):
    """Static sizes; row r of a tile is query head r % group of token r // group."""

    rows: int
    group: int
    key_block: int
    num_heads: int
    page_size: int
    head_dim: int
    interpret: bool


class Weighing(NamedTuple):
    """How logits become weights."""

    scale2_K: Array  # of the logits, base 2
    sinks_KG: Array | None
    spec: AttentionSpec


class Extent(NamedTuple):
    """What a tile attends to."""

    table_row: Array
    position: Array  # of its first token
    first: Array  # key
    end: Array  # key behind the last
    head: Array


def tokens_per_tile(group: int) -> int:
    return max(1, PREFILL_ROWS // group)


def _attend(
    q_XH: Array,
    pages_ref: Ref,
    table_ref: Ref,
    scale2: Array,
    extent: Extent,
    tiling: Tiling,
    spec: AttentionSpec,
) -> tuple[Array, Array, Array]:
    """Unnormalised output [X, H], sum of weights [X] and largest logit [X]; base 2."""
    rows_X, keys_Z = jnp.arange(tiling.rows), jnp.arange(tiling.key_block)
    position_X = extent.position + rows_X // tiling.group
    first = extent.first
    if spec.window is not None:  # what is before the first token's window is not loaded
        first = jnp.maximum(first, extent.position - spec.window + 1)
    multiply = partial(
        jnp.dot,
        precision=lax.Precision.HIGHEST if q_XH.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    def step(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc_XH, sum_X, max_X = state
        key_Z = first + block * tiling.key_block + keys_Z
        is_key_Z = key_Z < extent.end
        column_Z = key_Z // tiling.page_size
        page_Z = plt.load(table_ref.at[extent.table_row, column_Z], mask=is_key_Z, other=0)
        place_Z = (page_Z * tiling.num_heads + extent.head) * tiling.page_size
        place_Z += key_Z % tiling.page_size

        def load(column: int) -> Array:
            loaded_ZH = _load(pages_ref, place_Z, is_key_Z, tiling, column=column)
            if loaded_ZH.dtype == jnp.uint8:
                loaded_ZH = from_fp8_bits(loaded_ZH)
            return jnp.where(is_key_Z[:, None], loaded_ZH.astype(q_XH.dtype), 0)

        logits_XZ = multiply(q_XH, load(0).T) * scale2
        if spec.soft_cap is not None:
            cap2 = spec.soft_cap * LOG2_E
            # tanh by way of exp2, which all cards have
            logits_XZ = cap2 - 2.0 * cap2 / (1.0 + jnp.exp2(logits_XZ * (2.0 * LOG2_E / cap2)))
        visible_XZ = (key_Z[None, :] <= position_X[:, None]) & is_key_Z[None, :]
        if spec.window is not None:
            visible_XZ &= key_Z[None, :] > position_X[:, None] - spec.window
        logits_XZ = jnp.where(visible_XZ, logits_XZ, MASKED)
        new_max_X = jnp.maximum(max_X, logits_XZ.max(axis=1))
        decay_X = jnp.exp2(max_X - new_max_X)
        weights_XZ = jnp.exp2(logits_XZ - new_max_X[:, None])
        sum_X = sum_X * decay_X + weights_XZ.sum(axis=1)
        values_ZH = load(tiling.head_dim)
        gained_XH = multiply(weights_XZ.astype(q_XH.dtype), values_ZH)
        return acc_XH * decay_X[:, None] + gained_XH, sum_X, new_max_X

    num_blocks = (extent.end - first + tiling.key_block - 1) // tiling.key_block
    state = (
        jnp.zeros((tiling.rows, tiling.head_dim), jnp.float32),
        jnp.zeros((tiling.rows,), jnp.float32),
        jnp.full((tiling.rows,), MASKED, jnp.float32),
    )
    return lax.fori_loop(0, jnp.maximum(num_blocks, 0), step, state)


def _places(row_X: Array, width: int, *, column: int) -> tuple[Array, Array]:
    """Index arrays [X, width] of rows; slices beside index arrays do not run interpreted."""
    shape = (row_X.shape[0], width)
    column_H = jnp.arange(width) + column
    return jnp.broadcast_to(row_X[:, None], shape), jnp.broadcast_to(column_H[None, :], shape)


def _load(ref: Ref, row_X: Array, mask_X: Array, tiling: Tiling, *, column: int = 0) -> Array:
    """Rows of a matrix, [X, H] from a column on; what is masked is not read and may be anything."""
    row_XH, column_XH = _places(row_X, tiling.head_dim, column=column)
    return plt.load(ref.at[row_XH, column_XH], mask=jnp.broadcast_to(mask_X[:, None], row_XH.shape))


def _store(ref: Ref, row_X: Array, mask_X: Array, values_XH: Array) -> None:
    row_XH, column_XH = _places(row_X, values_XH.shape[1], column=0)
    mask_XH = jnp.broadcast_to(mask_X[:, None], row_XH.shape)
    plt.store(ref.at[row_XH, column_XH], values_XH, mask=mask_XH)


def _split_body(*refs: Ref, tiling: Tiling, spec: AttentionSpec) -> None:
    q_ref, pages_ref, table_ref, info_ref, seq_ref, scale_ref, out_ref, log_sum_ref = refs
    split, head = pl.program_id(0), pl.program_id(1)
    end = info_ref[split, 3]

    @pl.when(end > 0)
    def attend() -> None:
        rows_X = jnp.arange(tiling.rows)
        is_query_X = rows_X < tiling.group
        q_row_X = (seq_ref[split] * tiling.num_heads + head) * tiling.group + rows_X
        q_XH = _load(q_ref, q_row_X, is_query_X, tiling)
        extent = Extent(info_ref[split, 0], info_ref[split, 1], info_ref[split, 2], end, head)
        one_token = tiling._replace(group=tiling.rows)
        acc_XH, sum_X, max_X = _attend(
            q_XH, pages_ref, table_ref, scale_ref[head], extent, one_token, spec
        )
        sum_X = jnp.where(sum_X == 0.0, 1.0, sum_X)  # a window may leave a split nothing
        row_X = (split * tiling.num_heads + head) * tiling.group + rows_X
        _store(out_ref, row_X, is_query_X, acc_XH / sum_X[:, None])
        plt.store(log_sum_ref.at[row_X], max_X + jnp.log2(sum_X), mask=is_query_X)


def _combine_body(
    partial_ref: Ref,
    log_sum_ref: Ref,
    starts_ref: Ref,
    sinks_ref: Ref,
    out_ref: Ref,
    *,
    tiling: Tiling,
) -> None:
    seq, head = pl.program_id(0), pl.program_id(1)
    rows_X = jnp.arange(tiling.rows)
    is_query_X = rows_X < tiling.group
    sink_row_X = head * tiling.group + rows_X
    sink_X = plt.load(sinks_ref.at[sink_row_X], mask=is_query_X, other=0.0)

    def step(split: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc_XH, sum_X, max_X = state
        row_X = (split * tiling.num_heads + head) * tiling.group + rows_X
        log_sum_X = plt.load(log_sum_ref.at[row_X], mask=is_query_X, other=0.0)
        out_XH = _load(partial_ref, row_X, is_query_X, tiling)
        new_max_X = jnp.maximum(max_X, log_sum_X)
        decay_X, weight_X = jnp.exp2(max_X - new_max_X), jnp.exp2(log_sum_X - new_max_X)
        acc_XH = acc_XH * decay_X[:, None] + out_XH * weight_X[:, None]
        return acc_XH, sum_X * decay_X + weight_X, new_max_X

    init = (
        jnp.zeros((tiling.rows, tiling.head_dim), jnp.float32),
        jnp.ones((tiling.rows,), jnp.float32),  # the sink's own weight
        sink_X,
    )
    acc_XH, sum_X, _ = lax.fori_loop(starts_ref[seq], starts_ref[seq + 1], step, init)
    row_X = (seq * tiling.num_heads + head) * tiling.group + rows_X
    out_XH = (acc_XH / sum_X[:, None]).astype(out_ref.dtype)
    _store(out_ref, row_X, is_query_X, out_XH)


def _block_body(*refs: Ref, tiling: Tiling, spec: AttentionSpec) -> None:
    q_ref, pages_ref, table_ref, info_ref, scale_ref, sinks_ref, out_ref = refs
    block, head = pl.program_id(0), pl.program_id(1)
    position, token, count = info_ref[block, 1], info_ref[block, 2], info_ref[block, 3]

    @pl.when(count > 0)
    def attend() -> None:
        rows_X = jnp.arange(tiling.rows)
        is_query_X = rows_X < count * tiling.group
        query_X = rows_X % tiling.group
        row_X = ((token + rows_X // tiling.group) * tiling.num_heads + head) * tiling.group
        row_X += query_X
        q_XH = _load(q_ref, row_X, is_query_X, tiling)
        extent = Extent(info_ref[block, 0], position, jnp.int32(0), position + count, head)
        acc_XH, sum_X, max_X = _attend(
            q_XH, pages_ref, table_ref, scale_ref[head], extent, tiling, spec
        )
        sink_X = plt.load(sinks_ref.at[head * tiling.group + query_X])
        top_X = jnp.maximum(max_X, sink_X)
        scale_X = jnp.exp2(max_X - top_X)
        sum_X = sum_X * scale_X + jnp.exp2(sink_X - top_X)
        out_XH = (acc_XH * (scale_X / sum_X)[:, None]).astype(out_ref.dtype)
        _store(out_ref, row_X, is_query_X, out_XH)


def _call(body: Any, out_type: Any, grid: tuple[int, ...], tiling: Tiling, **statics: Any) -> Any:
    """A kernel that addresses memory by itself: its references are whole arrays."""
    is_large = tiling.rows * tiling.head_dim > PREFILL_ROWS * 128
    return pl.pallas_call(
        partial(body, tiling=tiling, **statics),
        out_shape=out_type,
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=8 if is_large else 4, num_stages=2),
        interpret=tiling.interpret,
    )


def _sinks_K(sinks_KG: Array | None, tiling: Tiling) -> Array:
    """Logits in base 2, [K * G]; MASKED where there are none."""
    if sinks_KG is None:
        return jnp.full((tiling.num_heads * tiling.group,), MASKED, jnp.float32)
    return (sinks_KG.astype(jnp.float32) * LOG2_E).reshape(-1)


def _make_tiling(q_TKGH: Array, pages_PKBC: Array, *, rows: int, interpret: bool) -> Tiling:
    num_heads, group, head_dim = q_TKGH.shape[1:]
    return Tiling(
        rows=pl.next_power_of_2(max(rows, MIN_ROWS)),
        group=group,
        key_block=64 if head_dim <= 128 else 32,
        num_heads=num_heads,
        page_size=pages_PKBC.shape[2],
        head_dim=head_dim,
        interpret=interpret,
    )


def attend_decodes(
    q_SKGH: Array,
    pages_PKBC: Array,
    layout: StepLayout,
    splits: DecodeSplits,
    weighing: Weighing,
    *,
    interpret: bool = False,
) -> Array:
    """[S, K, G, H]; zeros for what is no decode."""
    num_seqs, num_heads, group, head_dim = q_SKGH.shape
    tiling = _make_tiling(q_SKGH, pages_PKBC, rows=group, interpret=interpret)
    num_splits = splits.info_N4.shape[0]
    num_rows = num_splits * num_heads * group
    partials = (
        jax.ShapeDtypeStruct((num_rows, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((num_rows,), jnp.float32),
    )
    attend = _call(_split_body, partials, (num_splits, num_heads), tiling, spec=weighing.spec)
    partial_XH, log_sum_X = attend(
        q_SKGH.reshape(-1, head_dim),
        pages_PKBC.reshape(-1, 2 * head_dim),
        layout.page_table_RM,
        splits.info_N4,
        splits.seq_N,
        weighing.scale2_K,
    )
    out = jax.ShapeDtypeStruct((num_seqs * num_heads * group, head_dim), q_SKGH.dtype)
    combine = _call(_combine_body, out, (num_seqs, num_heads), tiling)
    out_XH = combine(partial_XH, log_sum_X, splits.starts_S1, _sinks_K(weighing.sinks_KG, tiling))
    return out_XH.reshape(q_SKGH.shape)


def attend_blocks(
    q_TKGH: Array,
    pages_PKBC: Array,
    layout: StepLayout,
    blocks: PrefillBlocks,
    weighing: Weighing,
    *,
    interpret: bool = False,
) -> Array:
    """[T, K, G, H] of the blocks' tokens; the others' rows are not written.

    The blocks were made with `tokens_per_tile(G)` tokens.
    """
    num_heads, group, head_dim = q_TKGH.shape[1:]
    rows = tokens_per_tile(group) * group
    tiling = _make_tiling(q_TKGH, pages_PKBC, rows=rows, interpret=interpret)
    q_XH = q_TKGH.reshape(-1, head_dim)
    out = jax.ShapeDtypeStruct(q_XH.shape, q_XH.dtype)
    attend = _call(
        _block_body, out, (blocks.info_I4.shape[0], num_heads), tiling, spec=weighing.spec
    )
    out_XH = attend(
        q_XH,
        pages_PKBC.reshape(-1, 2 * head_dim),
        layout.page_table_RM,
        blocks.info_I4,
        weighing.scale2_K,
        _sinks_K(weighing.sinks_KG, tiling),
    )
    return out_XH.reshape(q_TKGH.shape)
