"""Ragged paged attention in plain XLA ops, made for the CPU and correct everywhere.

Two parts share one flash-style loop over blocks of pages (online softmax, so nothing is as long
as a context): decodes are a batch with one query each; prefill chunks are a list of (sequence,
block of queries) items that a loop walks in token order. Trip counts are dynamic: a step reads
the pages that its sequences have, not those they could have.

XLA:CPU scatters floats of 16 and 8 bits by converting the whole buffer to float32 and back; their
bits as integers it moves as they are. So such pages are stored as uint16 and uint8 there
(`storage_dtype`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionBatch,
    AttentionParams,
    AttentionSpec,
    StepLayout,
    TokenPlaces,
)
from pallas_kernels.paged_attention.quantized import (
    from_fp8_bits,
    is_quantized,
    logit_scale_K,
    rows_to_store,
    value_scale_K,
)

QUERY_BLOCK = 64  # queries of a prefill item
KEY_BLOCK = 256  # keys read at a time, tokens


_FP8 = jnp.dtype(jnp.float8_e4m3fn)  # what uint8 bits mean


def storage_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of the page arrays that hold values of `dtype`."""
    dtype = jnp.dtype(dtype)
    if dtype == _FP8:
        return jnp.dtype(jnp.uint8)
    return jnp.dtype(jnp.uint16) if dtype.itemsize == 2 else dtype


def _meaning_of_uint16(operands: jnp.dtype) -> jnp.dtype:
    """What 16 bits in the pages are: the operands' type, bfloat16 if those are wider."""
    return operands if operands.itemsize == 2 else jnp.dtype(jnp.bfloat16)


def _to_storage(values: Array, storage: jnp.dtype) -> Array:
    if storage == values.dtype:
        return values
    if storage == jnp.uint16:
        values = values.astype(_meaning_of_uint16(values.dtype))
        return lax.bitcast_convert_type(values, jnp.uint16)
    return values.astype(storage)


def _from_storage(values: Array, operands: jnp.dtype) -> Array:
    """Float32 values of stored ones; `operands` is the type of queries, keys and values."""
    if values.dtype == jnp.uint8:
        return from_fp8_bits(values)
    if values.dtype == jnp.uint16:
        values = lax.bitcast_convert_type(values, _meaning_of_uint16(operands))
    return values.astype(jnp.float32)


def plan(layout: StepLayout, places: TokenPlaces, *, decode_only: bool) -> AttentionBatch:
    """The list of prefill items, unless the step has none.

    `work` is (item_seq_I, item_token_I, num_items): of each block of queries its sequence and
    its first token.
    """
    num_tokens, num_seqs = places.seq_T.shape[0], layout.slots_S.shape[0]
    if decode_only:
        return AttentionBatch(layout=layout, places=places, work=(), decode_only=True)
    seqs_S = jnp.arange(num_seqs, dtype=jnp.int32)
    lengths_S = layout.query_starts_S1[1:] - layout.query_starts_S1[:-1]
    is_prefill_S = (seqs_S >= layout.num_decodes) & (seqs_S < layout.num_seqs)
    blocks_S = jnp.where(is_prefill_S, -(-lengths_S // QUERY_BLOCK), 0)
    item_ends_S = jnp.cumsum(blocks_S, dtype=jnp.int32)
    items_I = jnp.arange(num_tokens // QUERY_BLOCK + num_seqs, dtype=jnp.int32)
    seq_I = (items_I[:, None] >= item_ends_S[None, :]).sum(axis=1, dtype=jnp.int32)
    seq_I = seq_I.clip(max=num_seqs - 1)
    block_I = items_I - (item_ends_S - blocks_S)[seq_I]
    token_I = layout.query_starts_S1[seq_I] + block_I * QUERY_BLOCK
    work = (seq_I, token_I, item_ends_S[-1])
    return AttentionBatch(layout=layout, places=places, work=work, decode_only=False)


class _Queries(NamedTuple):
    """W blocks of X consecutive queries, each of one sequence."""

    q_WXKGH: Array
    slot_W: Array  # page table row
    position_W: Array  # of the first query
    length_W: Array  # keys of the sequence, the block's own included; 0: nothing to do


def _attend(
    queries: _Queries,
    pages_PKBC: Array,
    page_table_RM: Array,
    spec: AttentionSpec,
    params: AttentionParams,
) -> Array:
    """Attention of W blocks over their pages, float32 [W, X, K, G, H]."""
    num_blocks_W, num_queries, num_kv, group, head_dim = queries.q_WXKGH.shape
    page_size, max_pages = pages_PKBC.shape[2], page_table_RM.shape[1]
    pages_per_block = max(1, min(KEY_BLOCK // page_size, max_pages))
    keys_per_block = pages_per_block * page_size
    scale_K = logit_scale_K(spec.scale, params, num_kv)
    q_WKXGH = queries.q_WXKGH.swapaxes(1, 2).astype(jnp.float32) * scale_K[:, None, None, None]
    q_WKYH = q_WKXGH.reshape(num_blocks_W, num_kv, num_queries * group, head_dim)
    q_position_WX = queries.position_W[:, None] + jnp.arange(num_queries, dtype=jnp.int32)
    last_WX = jnp.minimum(q_position_WX + 1, queries.length_W[:, None])  # keys before this

    def body(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        max_WKY, sum_WKY, acc_WKYH = carry
        columns_J = block * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)
        pages_WJ = page_table_RM[queries.slot_W[:, None], columns_J.clip(max=max_pages - 1)]
        kv_WKJBC = pages_PKBC[pages_WJ[:, None, :], jnp.arange(num_kv)[None, :, None]]
        kv_WKZC = _from_storage(kv_WKJBC, queries.q_WXKGH.dtype).reshape(
            num_blocks_W, num_kv, keys_per_block, 2 * head_dim
        )
        logits_WKYZ = jnp.einsum("WKYH,WKZH->WKYZ", q_WKYH, kv_WKZC[..., :head_dim])
        if spec.soft_cap is not None:
            logits_WKYZ = spec.soft_cap * jnp.tanh(logits_WKYZ / spec.soft_cap)
        position_Z = block * keys_per_block + jnp.arange(keys_per_block, dtype=jnp.int32)
        visible_WXZ = position_Z < last_WX[..., None]
        if spec.window is not None:
            visible_WXZ &= position_Z > q_position_WX[..., None] - spec.window
        visible_WKYZ = jnp.repeat(visible_WXZ, group, axis=1)[:, None]
        logits_WKYZ = jnp.where(visible_WKYZ, logits_WKYZ, -jnp.inf)
        new_max_WKY = jnp.maximum(max_WKY, logits_WKYZ.max(axis=-1))
        finite_max_WKY = jnp.where(jnp.isneginf(new_max_WKY), 0.0, new_max_WKY)
        weights_WKYZ = jnp.exp(logits_WKYZ - finite_max_WKY[..., None])
        decay_WKY = jnp.exp(max_WKY - finite_max_WKY)
        # Unwritten places may hold NaN, and zero times NaN is NaN: values are masked as well.
        written_WZ = position_Z < queries.length_W[:, None]
        v_WKZH = jnp.where(written_WZ[:, None, :, None], kv_WKZC[..., head_dim:], 0.0)
        acc_WKYH = acc_WKYH * decay_WKY[..., None] + jnp.einsum(
            "WKYZ,WKZH->WKYH", weights_WKYZ, v_WKZH
        )
        return new_max_WKY, sum_WKY * decay_WKY + weights_WKYZ.sum(axis=-1), acc_WKYH

    shape = (num_blocks_W, num_kv, num_queries * group)
    max_WKY = jnp.full(shape, -jnp.inf, jnp.float32)
    sum_WKY = jnp.zeros(shape, jnp.float32)
    if params.sinks_KG is not None:  # a logit that was seen before all keys
        max_WKY = jnp.broadcast_to(jnp.tile(params.sinks_KG, (1, num_queries)), shape)
        sum_WKY = jnp.ones(shape, jnp.float32)
    init = (max_WKY, sum_WKY, jnp.zeros((*shape, head_dim), jnp.float32))
    last_key = jnp.max(jnp.where(queries.length_W > 0, last_WX.max(axis=1), 0))
    first_key = jnp.int32(0)
    if spec.window is not None:
        starts_W = jnp.maximum(queries.position_W - spec.window + 1, 0)
        first_key = jnp.min(jnp.where(queries.length_W > 0, starts_W, jnp.iinfo(jnp.int32).max))
    lower = jnp.minimum(first_key // keys_per_block, -(-last_key // keys_per_block))
    _, sum_WKY, acc_WKYH = lax.fori_loop(lower, -(-last_key // keys_per_block), body, init)
    out_WKYH = acc_WKYH / jnp.where(sum_WKY == 0, 1.0, sum_WKY)[..., None]
    out_WKYH *= value_scale_K(params, num_kv)[:, None, None]
    out_WKXGH = out_WKYH.reshape(num_blocks_W, num_kv, num_queries, group, head_dim)
    return out_WKXGH.swapaxes(1, 2)


def _write(
    k_TKH: Array,
    v_TKH: Array,
    pages_PKBC: Array,
    batch: AttentionBatch,
    params: AttentionParams,
) -> Array:
    if pages_PKBC.dtype == jnp.uint8:
        kv_TKC = rows_to_store(k_TKH, v_TKH, params, _FP8)
        kv_TKC = lax.bitcast_convert_type(kv_TKC, jnp.uint8)
    elif is_quantized(pages_PKBC.dtype):
        kv_TKC = rows_to_store(k_TKH, v_TKH, params, pages_PKBC.dtype)
    else:
        kv_TKC = _to_storage(jnp.concatenate([k_TKH, v_TKH], axis=-1), pages_PKBC.dtype)
    places = batch.places
    return pages_PKBC.at[places.page_T, :, places.offset_T].set(kv_TKC, mode="drop")


def paged_attention(
    q_TKGH: Array,
    k_TKH: Array,
    v_TKH: Array,
    pages_PKBC: Array,
    batch: AttentionBatch,
    spec: AttentionSpec,
    params: AttentionParams = NO_PARAMS,
) -> tuple[Array, Array]:
    """See api.PagedAttention."""
    pages_PKBC = _write(k_TKH, v_TKH, pages_PKBC, batch, params)
    layout = batch.layout
    num_tokens, num_seqs = q_TKGH.shape[0], layout.slots_S.shape[0]
    is_decode_S = jnp.arange(num_seqs) < layout.num_decodes
    decodes = _Queries(
        q_WXKGH=q_TKGH[:num_seqs, None],
        slot_W=layout.slots_S,
        position_W=layout.starts_S,
        length_W=jnp.where(is_decode_S, layout.starts_S + 1, 0),
    )
    decoded_SKGH = _attend(decodes, pages_PKBC, layout.page_table_RM, spec, params)[:, 0]
    if batch.decode_only:
        return decoded_SKGH.astype(q_TKGH.dtype), pages_PKBC

    # Blocks are written in token order, so what a block writes past its sequence's end is
    # overwritten by the sequences behind it; QUERY_BLOCK spare rows take the last one's excess.
    spare = ((0, QUERY_BLOCK), (0, 0), (0, 0), (0, 0))
    padded_q_TKGH = jnp.pad(q_TKGH, spare)
    out_TKGH = jnp.zeros((num_tokens + QUERY_BLOCK, *q_TKGH.shape[1:]), jnp.float32)
    out_TKGH = out_TKGH.at[:num_seqs].set(decoded_SKGH)
    item_seq_I, item_token_I, num_items = batch.work

    def attend_item(item: Array, out_TKGH: Array) -> Array:
        seq, token = item_seq_I[item], item_token_I[item]
        start = layout.query_starts_S1[seq]
        block = _Queries(
            q_WXKGH=lax.dynamic_slice_in_dim(padded_q_TKGH, token, QUERY_BLOCK)[None],
            slot_W=layout.slots_S[seq][None],
            position_W=(layout.starts_S[seq] + token - start)[None],
            length_W=(layout.starts_S[seq] + layout.query_starts_S1[seq + 1] - start)[None],
        )
        out_XKGH = _attend(block, pages_PKBC, layout.page_table_RM, spec, params)[0]
        return lax.dynamic_update_slice_in_dim(out_TKGH, out_XKGH, token, axis=0)

    out_TKGH = jax.lax.fori_loop(0, num_items, attend_item, out_TKGH)
    return out_TKGH[:num_tokens].astype(q_TKGH.dtype), pages_PKBC
