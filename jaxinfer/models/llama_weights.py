"""Which checkpoint tensors make up the parameters of models/llama.py: data only.

Hugging Face stores a projection as [out, in]; the engine keeps the contracted dimension first.
"""

from collections.abc import Iterator

import numpy as np

from jaxinfer.models.llama_config import LlamaConfig
from jaxinfer.models.pieces import Arrange, ParamPieces, Piece, Region


def is_optional(name: str, *, tied: bool) -> bool:
    """Tensors that checkpoints carry and not everybody needs: rope tables, a tied head's copy,
    scales of an 8-bit KV cache."""
    if ".self_attn." in name and name.endswith(("k_scale", "v_scale", "_proj.output_scale")):
        return True
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def llama_pieces(config: LlamaConfig) -> ParamPieces:
    """All parameters of a model, by the path of the parameter in the module."""
    table = (config.vocab_size, config.model_dim)
    pieces: ParamPieces = {
        "embedding.table": (
            _whole("model.embed_tokens.weight", table, region=(slice(config.vocab_size),)),
        ),
        "final_norm.scale": (_whole("model.norm.weight", (config.model_dim,)),),
    }
    if not config.tie_embeddings:
        pieces["head.kernel"] = (
            _transposed("lm_head.weight", table, region=(slice(None), slice(config.vocab_size))),
        )
    for layer in range(config.num_layers):
        source = f"model.layers.{layer}"
        layer_pieces = _attention_pieces(config, source) | _mlp_pieces(config, source)
        pieces |= {f"layers.{layer}.{path}": value for path, value in layer_pieces.items()}
    return pieces


def _mlp_pieces(config: LlamaConfig, source: str) -> ParamPieces:
    hidden, dim = config.hidden_dim, config.model_dim
    gate_up = tuple(enumerate(("gate_proj", "up_proj")))
    pieces: ParamPieces = {
        "mlp_norm.scale": (_whole(f"{source}.post_attention_layernorm.weight", (dim,)),),
        "mlp.gate_up.kernel": tuple(
            _transposed(
                f"{source}.mlp.{name}.weight",
                (hidden, dim),
                region=(slice(None), index, slice(hidden)),
            )
            for index, name in gate_up
        ),
        "mlp.down.kernel": (
            _transposed(f"{source}.mlp.down_proj.weight", (dim, hidden), region=(slice(hidden),)),
        ),
    }
    if config.mlp_bias:
        pieces["mlp.gate_up.bias"] = tuple(
            _whole(f"{source}.mlp.{name}.bias", (hidden,), region=(index, slice(hidden)))
            for index, name in gate_up
        )
        pieces["mlp.down.bias"] = (_whole(f"{source}.mlp.down_proj.bias", (dim,)),)
    return pieces


def _attention_pieces(config: LlamaConfig, source: str) -> ParamPieces:
    """Head by head, so that any head layout can be filled."""
    prefix = f"{source}.self_attn"
    pieces: ParamPieces = {
        "attention_norm.scale": (_whole(f"{source}.input_layernorm.weight", (config.model_dim,)),),
        "attention.qkv.kernel": _qkv(config, prefix, "weight"),
        "attention.out.kernel": tuple(
            Piece(
                name=f"{prefix}.o_proj.weight",
                shape=(config.model_dim, config.num_heads * config.head_dim),
                arrange=_head_columns(source_head, config.head_dim),
                region=(kv_head, place),
            )
            for kv_head, place, source_head in _queries(config)
        ),
    }
    if config.qkv_bias:
        pieces["attention.qkv.bias"] = _qkv(config, prefix, "bias")
    if config.out_bias:
        pieces["attention.out.bias"] = (_whole(f"{prefix}.o_proj.bias", (config.model_dim,)),)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            pieces[f"attention.{name}.scale"] = (
                _whole(f"{prefix}.{name}.weight", (config.head_dim,)),
            )
    return pieces


def _queries(config: LlamaConfig) -> Iterator[tuple[int, int, int]]:
    """(KV head, place in its group, model's query head) of every query that is not a dummy."""
    for kv_head, queries in enumerate(config.heads.query_source):
        for place, source_head in enumerate(queries):
            if source_head >= 0:
                yield kv_head, place, source_head


def _qkv(config: LlamaConfig, prefix: str, kind: str) -> tuple[Piece, ...]:
    """The merged projection: `kind` "weight" fills [D, K, R, H], "bias" [K, R, H]."""
    leading = (slice(None),) if kind == "weight" else ()
    inner = (config.model_dim,) if kind == "weight" else ()
    group = config.heads.queries_per_kv

    def piece(projection: str, num_heads: int, kv_head: int, row: int, source_head: int) -> Piece:
        return Piece(
            name=f"{prefix}.{projection}.{kind}",
            shape=(num_heads * config.head_dim, *inner),
            arrange=_head_rows(source_head, config.head_dim),
            region=(*leading, kv_head, row),
        )

    queries = [
        piece("q_proj", config.num_heads, kv_head, place, source_head)
        for kv_head, place, source_head in _queries(config)
    ]
    keys_values = [
        piece(projection, config.num_kv_heads, kv_head, row, source_head)
        for projection, row in (("k_proj", group), ("v_proj", group + 1))
        for kv_head, source_head in enumerate(config.heads.kv_source)
        if source_head >= 0
    ]
    return tuple(queries + keys_values)


def _whole(name: str, shape: tuple[int, ...], *, region: Region = ()) -> Piece:
    return Piece(name=name, shape=shape, arrange=lambda array: array, region=region)


def _transposed(name: str, shape: tuple[int, ...], *, region: Region) -> Piece:
    return Piece(name=name, shape=shape, arrange=np.transpose, region=region)


def _head_rows(index: int, head_dim: int) -> Arrange:
    """Rows of one head of [(heads * H), D] as [D, H]; of a bias [(heads * H)] as [H]."""
    return lambda array: array[index * head_dim : (index + 1) * head_dim].T


def _head_columns(index: int, head_dim: int) -> Arrange:
    """Columns of one head of [D, (heads * H)] as [H, D]."""
    return lambda array: array[:, index * head_dim : (index + 1) * head_dim].T
