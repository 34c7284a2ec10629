"""The Llama family on one module: Llama 2/3, Mistral, Qwen2/2.5, Qwen3, Granite 3, SmolLM2/3.

What differs between them is data (`LlamaConfig`): biases, QK norm, per-layer windows and rope,
Granite's multipliers. Letters are those of docs/glossary.md.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import Array

from jaxinfer.layers.attention import Attention, AttentionConfig
from jaxinfer.layers.batch_types import LayerContext, StepBatch
from jaxinfer.layers.einsum import Einsum
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.layout import rows_first
from jaxinfer.layers.mlp import GatedMLP
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.rope import RopeAngles, shared_rope_angles
from jaxinfer.models.base import ModelDef, ModelShape
from jaxinfer.models.hf_config import checkpoint_dtype, require
from jaxinfer.models.llama_config import LlamaConfig, config_from_hf
from jaxinfer.models.llama_weights import is_optional, llama_pieces


class DecoderLayer(nnx.Module):
    """Attention and MLP, each on a normed input and added to the residual stream."""

    def __init__(self, context: LayerContext, config: LlamaConfig, layer: int) -> None:
        attention = AttentionConfig(
            num_kv_heads=config.heads.num_kv_heads,
            queries_per_kv=config.heads.queries_per_kv,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            window=config.windows[layer],
            use_rope=config.rope_layers[layer],
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        D = config.model_dim  # noqa: N806
        self.attention_norm = RMSNorm(context, "D", eps=config.norm_eps, D=D)
        self.attention = Attention(context, attention, model_dim=D)
        self.mlp_norm = RMSNorm(context, "D", eps=config.norm_eps, D=D)
        self.mlp = GatedMLP(
            context, model_dim=D, hidden_dim=config.padded_hidden_dim, use_bias=config.mlp_bias
        )
        self.residual_multiplier = config.residual_multiplier

    def __call__(
        self, x_TD: Array, pages_PKBC: Array, angles: RopeAngles, batch: StepBatch
    ) -> tuple[Array, Array]:
        attended_TD, pages_PKBC = self.attention(
            self.attention_norm(x_TD), pages_PKBC, angles, batch
        )
        x_TD = x_TD + attended_TD * self.residual_multiplier
        mlp_TD = self.mlp(self.mlp_norm(x_TD), num_rows=batch.num_tokens)
        x_TD = x_TD + mlp_TD * self.residual_multiplier
        return x_TD, pages_PKBC


@partial(jax.jit, static_argnums=0)
def _run_layer(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x_TD: Array,
    pages_PKBC: Array,
    angles: RopeAngles,
    batch: StepBatch,
) -> tuple[Array, Array]:
    """One layer, as a function of its own: equal layers are traced and lowered once.

    XLA still sees L copies (it inlines the calls), so the program is the unrolled one.
    """
    layer = nnx.merge(graphdef, state)
    return layer(x_TD, pages_PKBC, angles, batch)


class Llama(nnx.Module):
    """A CausalLM (models/base.py)."""

    def __init__(self, context: LayerContext, config: LlamaConfig) -> None:
        V, D = config.padded_vocab_size, config.model_dim  # noqa: N806
        self.embedding = Embedding(context, V=V, D=D)
        self.layers = nnx.List(
            [DecoderLayer(context, config, layer) for layer in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(context, "D", eps=config.norm_eps, D=D)
        self.head = None if config.tie_embeddings else Einsum(context, "SD,DV->SV", D=D, V=V)
        self.config = config
        self.mesh = context.mesh

    def __call__(
        self, token_ids_T: Array, pages_L: tuple[Array, ...], batch: StepBatch
    ) -> tuple[Array, tuple[Array, ...]]:
        angles = shared_rope_angles(batch.positions_T, self.config.rope)
        x_TD = self.embedding(token_ids_T) * self.config.embedding_multiplier
        new_pages_L = []
        for layer, pages_PKBC in zip(self.layers, pages_L, strict=True):
            x_TD, pages_PKBC = _run_layer(*nnx.split(layer), x_TD, pages_PKBC, angles, batch)
            new_pages_L.append(pages_PKBC)
        return x_TD, tuple(new_pages_L)

    def logits(self, hidden_SD: Array, *, num_rows: Array) -> Array:
        hidden_SD = self.final_norm(hidden_SD)  # of the rows that are asked for
        if self.head is None:
            logits_SV = self.embedding.attend(hidden_SD, num_rows=num_rows)
        else:
            logits_SV = self.head(hidden_SD, num_rows=num_rows)
        logits_SV = logits_SV.astype("float32") / self.config.logits_divisor
        return rows_first(logits_SV, self.mesh)


def llama_family(config: Mapping[str, Any], *, tensor: int) -> ModelDef:
    """See models/base.py ModelFamily."""
    parsed = config_from_hf(config, tensor=tensor)
    return ModelDef(
        shape=ModelShape(
            num_layers=parsed.num_layers,
            num_kv_heads=parsed.heads.num_kv_heads,
            queries_per_kv=parsed.heads.queries_per_kv,
            head_dim=parsed.head_dim,
            vocab_size=parsed.vocab_size,
            max_position_embeddings=int(require(config, "max_position_embeddings")),
            checkpoint_dtype=checkpoint_dtype(config),
            kv_source=parsed.heads.kv_source,
        ),
        build=lambda context: Llama(context, parsed),
        pieces=llama_pieces(parsed),
        is_optional=partial(is_optional, tied=parsed.tie_embeddings),
    )
