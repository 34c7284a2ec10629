"""Ragged paged attention on CPUs in C++ (native/paged_attention.cc), called through XLA's FFI.

See api.PagedAttention; per-step metadata and storage are those of xla.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.native.library import NativeAttention
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionBatch,
    AttentionParams,
    AttentionSpec,
    EmptyPages,
    PagedAttention,
)

_PAGES_OPERAND, _PAGES_RESULT = 3, 1


def make_paged_attention(native: NativeAttention) -> PagedAttention:
    """The op in C++. A layer with a soft cap, sinks or scales takes the XLA implementation."""
    storage = xla.storage_dtype(native.page_dtype)

    def paged_attention(
        q_TKGH: Array,
        k_TKH: Array,
        v_TKH: Array,
        pages_PKBC: Array,
        batch: AttentionBatch,
        spec: AttentionSpec,
        params: AttentionParams = NO_PARAMS,
    ) -> tuple[Array, Array]:
        if spec.soft_cap is not None or not params.is_empty:
            return xla.paged_attention(q_TKGH, k_TKH, v_TKH, pages_PKBC, batch, spec, params)
        assert pages_PKBC.dtype == storage, f"made for {native.page_dtype} pages"
        layout, places = batch.layout, batch.places
        call = jax.ffi.ffi_call(
            native.target,
            (
                jax.ShapeDtypeStruct(q_TKGH.shape, jnp.float32),
                jax.ShapeDtypeStruct(pages_PKBC.shape, pages_PKBC.dtype),
            ),
            input_output_aliases={_PAGES_OPERAND: _PAGES_RESULT},
        )
        out_TKGH, pages_PKBC = call(
            q_TKGH.astype(jnp.float32),
            k_TKH.astype(jnp.float32),
            v_TKH.astype(jnp.float32),
            pages_PKBC,
            places.page_T,
            places.offset_T,
            layout.slots_S,
            layout.starts_S,
            layout.query_starts_S1,
            layout.num_seqs,
            layout.page_table_RM,
            scale=np.float32(spec.scale),
            window=np.int64(spec.window or 0),
        )
        return out_TKGH.astype(q_TKGH.dtype), pages_PKBC

    return paged_attention


def make_empty_pages(native: NativeAttention) -> EmptyPages:
    """Pages in memory that is neither written nor mapped before tokens come."""

    def empty_pages(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jax.ffi.ffi_call(native.empty_pages_target, jax.ShapeDtypeStruct(shape, dtype))()

    return empty_pages
