"""Grouped-query attention over a paged cache. Knows neither pages nor kernels: it calls one op.

Letters: T tokens, D model, K kv heads, G query heads per kv head, R = G + 2 rows of a kv head in
the merged projection (its queries, its key, its value), H head dim.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array, shard_map
from jax.sharding import PartitionSpec

from jaxinfer.layers.batch_types import LayerContext, StepBatch
from jaxinfer.layers.einsum import Einsum
from jaxinfer.layers.layout import heads_first
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.rope import RopeAngles, apply_rope
from jaxinfer.parallel.rules import spec_of
from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionBatch,
    AttentionParams,
    AttentionSpec,
)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One layer's attention."""

    num_kv_heads: int
    queries_per_kv: int
    head_dim: int
    scale: float
    window: int | None = None
    use_rope: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None  # RMS norm of each query and key head (Qwen3)


class Attention(nnx.Module):
    """Projections, rotary embedding and the paged attention op."""

    def __init__(self, context: LayerContext, config: AttentionConfig, *, model_dim: int) -> None:
        dims = {
            "D": model_dim,
            "K": config.num_kv_heads,
            "G": config.queries_per_kv,
            "R": config.queries_per_kv + 2,
            "H": config.head_dim,
        }
        qkv_bias = "KRH" if config.qkv_bias else None
        out_bias = "D" if config.out_bias else None
        self.qkv = Einsum(context, "TD,DKRH->TKRH", bias=qkv_bias, **dims)
        self.out = Einsum(context, "TKGH,KGHD->TD", bias=out_bias, **dims)
        eps = config.qk_norm_eps
        self.q_norm = RMSNorm(context, "H", eps=eps, **dims) if eps is not None else None
        self.k_norm = RMSNorm(context, "H", eps=eps, **dims) if eps is not None else None
        # Not weights of the model: runner/kv_scales.py makes them.
        self.k_scale = _scale(config, "k") if context.kv_scales else None
        self.v_scale = _scale(config, "v") if context.kv_scales else None
        self.config = config
        self.paged_attention = context.kernels.paged_attention
        self.mesh = context.mesh

    def __call__(
        self, x_TD: Array, pages_PKBC: Array, angles: RopeAngles, batch: StepBatch
    ) -> tuple[Array, Array]:
        """[T, D] and the layer's pages -> [T, D] and the pages with the step's K/V."""
        qkv_TKRH = heads_first(self.qkv(x_TD, num_rows=batch.num_tokens), self.mesh)
        group = self.config.queries_per_kv
        q_TKGH, k_TK1H, v_TK1H = jnp.split(qkv_TKRH, (group, group + 1), axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_TKGH, k_TK1H = self.q_norm(q_TKGH), self.k_norm(k_TK1H)
        if self.config.use_rope:
            q_TKGH = heads_first(apply_rope(q_TKGH, angles), self.mesh)
            k_TK1H = heads_first(apply_rope(k_TK1H, angles), self.mesh)
        k_TKH, v_TKH = k_TK1H[:, :, 0], v_TK1H[:, :, 0]
        out_TKGH, pages_PKBC = self._attend(q_TKGH, k_TKH, v_TKH, pages_PKBC, batch)
        return self.out(out_TKGH, num_rows=batch.num_tokens), pages_PKBC

    def _attend(
        self, q_TKGH: Array, k_TKH: Array, v_TKH: Array, pages_PKBC: Array, batch: StepBatch
    ) -> tuple[Array, Array]:
        """The op on each device's own heads: kernels never see the mesh."""
        spec = AttentionSpec(scale=self.config.scale, window=self.config.window)
        params = NO_PARAMS
        if self.k_scale is not None and self.v_scale is not None:
            params = AttentionParams(
                k_scale_K=self.k_scale.get_value(), v_scale_K=self.v_scale.get_value()
            )

        def local(
            q: Array,
            k: Array,
            v: Array,
            pages: Array,
            metadata: AttentionBatch,
            params: AttentionParams,
        ) -> tuple[Array, Array]:
            return self.paged_attention(q, k, v, pages, metadata, spec, params)

        pages_spec = spec_of("PKBC")
        return shard_map(
            local,
            mesh=self.mesh,
            in_specs=(
                spec_of("TKGH"),
                spec_of("TKH"),
                spec_of("TKH"),
                pages_spec,
                PartitionSpec(),
                spec_of("K"),  # of each scale
            ),
            out_specs=(spec_of("TKGH"), pages_spec),
            check_vma=False,
        )(q_TKGH, k_TKH, v_TKH, pages_PKBC, batch.attention, params)


def _scale(config: AttentionConfig, part: str) -> nnx.Param:
    """Of each KV head: what is stored times the scale is the key or value."""
    return nnx.Param(jnp.ones(config.num_kv_heads, jnp.float32), spec=spec_of("K"), kv_scale=part)
