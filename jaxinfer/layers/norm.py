"""RMS normalisation (Zhang & Sennrich 2019, arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxinfer.layers.batch_types import LayerContext
from jaxinfer.layers.einsum import weight


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension; the statistics in float32."""

    def __init__(self, context: LayerContext, letter: str, *, eps: float, **dims: int) -> None:
        self.scale = weight(context, letter, **dims)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        scale = self.scale.get_value()
        return normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
