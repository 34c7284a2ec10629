"""Ragged paged attention, as plainly as it can be said: the oracle for every backend.

Each token gathers its sequence's whole page row. Slow and large; for tests and small shapes.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionBatch,
    AttentionParams,
    AttentionSpec,
    StepLayout,
    TokenPlaces,
)
from pallas_kernels.paged_attention.quantized import logit_scale_K, rows_to_store, value_scale_K


def plan(layout: StepLayout, places: TokenPlaces, *, decode_only: bool) -> AttentionBatch:
    """Nothing to prepare."""
    return AttentionBatch(layout=layout, places=places, work=(), decode_only=decode_only)


def paged_attention(
    q_TKGH: Array,
    k_TKH: Array,
    v_TKH: Array,
    pages_PKBC: Array,
    batch: AttentionBatch,
    spec: AttentionSpec,
    params: AttentionParams = NO_PARAMS,
) -> tuple[Array, Array]:
    """See api.PagedAttention; all arithmetic in float32."""
    seq_T, position_T, page_T, offset_T = batch.places
    num_kv, head_dim = q_TKGH.shape[1], q_TKGH.shape[-1]
    kv_TKC = rows_to_store(k_TKH, v_TKH, params, pages_PKBC.dtype)
    pages_PKBC = pages_PKBC.at[page_T, :, offset_T].set(kv_TKC, mode="drop")
    rows_TM = batch.layout.page_table_RM[batch.layout.slots_S[seq_T]]
    kv_TMKBC = pages_PKBC[rows_TM].astype(jnp.float32)
    kv_TKXC = kv_TMKBC.transpose(0, 2, 1, 3, 4).reshape(
        kv_TMKBC.shape[0], kv_TMKBC.shape[2], -1, 2 * head_dim
    )
    logits_TKGX = jnp.einsum("TKGH,TKXH->TKGX", q_TKGH.astype(jnp.float32), kv_TKXC[..., :head_dim])
    logits_TKGX *= logit_scale_K(spec.scale, params, num_kv)[:, None, None]
    if spec.soft_cap is not None:
        logits_TKGX = spec.soft_cap * jnp.tanh(logits_TKGX / spec.soft_cap)
    key_position_X = jnp.arange(kv_TKXC.shape[2])
    visible_TX = key_position_X[None, :] <= position_T[:, None]
    if spec.window is not None:
        visible_TX &= key_position_X[None, :] > position_T[:, None] - spec.window
    logits_TKGX = jnp.where(visible_TX[:, None, None, :], logits_TKGX, -jnp.inf)
    max_TKG1 = logits_TKGX.max(axis=-1, keepdims=True)
    if params.sinks_KG is not None:
        max_TKG1 = jnp.maximum(max_TKG1, params.sinks_KG[..., None])
    weights_TKGX = jnp.exp(logits_TKGX - max_TKG1)
    sum_TKG1 = weights_TKGX.sum(axis=-1, keepdims=True)
    if params.sinks_KG is not None:
        sum_TKG1 += jnp.exp(params.sinks_KG[..., None] - max_TKG1)
    weights_TKGX /= sum_TKG1
    # Places that the sequence never wrote may hold anything, NaN included: zero times NaN is NaN.
    values_TKXH = jnp.where(visible_TX[:, None, :, None], kv_TKXC[..., head_dim:], 0.0)
    out_TKGH = jnp.einsum("TKGX,TKXH->TKGH", weights_TKGX, values_TKXH)
    out_TKGH *= value_scale_K(params, num_kv)[:, None, None]
    return out_TKGH.astype(q_TKGH.dtype), pages_PKBC
