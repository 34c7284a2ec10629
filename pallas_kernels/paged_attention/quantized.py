"""Keys and values in pages of one byte: what is stored is value / scale, int8 or float8_e4m3fn.

Knows numbers only: no pages, no batches. Wider pages hold values as they are, without scales.
The convention is that of checkpoints in the compressed-tensors format: symmetric, a scale per
tensor or head.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.paged_attention.api import AttentionParams

QUANTIZED_DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether pages of this dtype hold scaled values."""
    return jnp.dtype(dtype) in QUANTIZED_DTYPES


def largest_value(dtype: DTypeLike) -> float:
    """Of a page dtype of one byte; int8 is used symmetrically."""
    assert is_quantized(dtype), dtype
    return 127.0 if jnp.dtype(dtype) == jnp.int8 else float(jnp.finfo(dtype).max)


def quantize(values_TKH: Array, scale_K: Array | None, dtype: DTypeLike) -> Array:
    """float [T, K, H] as they are stored; those out of range become the largest there is."""
    scaled_TKH = values_TKH.astype(jnp.float32)
    if scale_K is not None:
        scaled_TKH = scaled_TKH / scale_K[None, :, None]
    limit = largest_value(dtype)
    scaled_TKH = jnp.clip(scaled_TKH, -limit, limit)
    if jnp.dtype(dtype) == jnp.int8:
        scaled_TKH = jnp.round(scaled_TKH)
    return scaled_TKH.astype(dtype)


def rows_to_store(k_TKH: Array, v_TKH: Array, params: AttentionParams, dtype: DTypeLike) -> Array:
    """A step's keys and values as pages of `dtype` hold them, [T, K, 2H]."""
    if is_quantized(dtype):
        k_TKH = quantize(k_TKH, params.k_scale_K, dtype)
        v_TKH = quantize(v_TKH, params.v_scale_K, dtype)
    return jnp.concatenate([k_TKH, v_TKH], axis=-1).astype(dtype)


def logit_scale_K(scale: float, params: AttentionParams, num_kv_heads: int) -> Array:
    """The factor of q.k for each kv head, from stored keys; float32 [K]."""
    scale_K = jnp.full((num_kv_heads,), scale, jnp.float32)
    return scale_K if params.k_scale_K is None else scale_K * params.k_scale_K


def value_scale_K(params: AttentionParams, num_kv_heads: int) -> Array:
    """The factor of the weighted sum of stored values for each kv head; float32 [K]."""
    return jnp.ones((num_kv_heads,), jnp.float32) if params.v_scale_K is None else params.v_scale_K


def from_fp8_bits(bits: Array) -> Array:
    """Float32 values of float8_e4m3fn's bits (uint8), through float16: for devices that have no
    such type, and on a CPU half the time of XLA's own.

    Sign, exponent and mantissa are put where float16 has them; its exponent counts from 2**-14,
    float8_e4m3fn's from 2**-6. The largest pattern is NaN.
    """
    wide = bits.astype(jnp.uint16)
    magnitude = wide & jnp.uint16(0x7F)
    halves = ((wide & jnp.uint16(0x80)) << 8) | (magnitude << 7)
    values = lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32) * 256.0
    return jnp.where(magnitude == 0x7F, jnp.nan, values)
