"""The Llama family's config.json, read strictly into one frozen record. No modules, no tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxinfer.errors import CheckpointError
from jaxinfer.layers.rope import RopeConfig, rope_from_hf
from jaxinfer.models.hf_config import refuse_unknown, require
from jaxinfer.parallel.heads import HeadLayout, plan_heads

_LANES = 128
_MOST_PADDING = 16  # at most a part in so many of the vocabulary is padding
QK_NORM_TYPES = ("qwen3",)
QKV_BIAS_TYPES = ("qwen2",)  # always biased; the others say so with `attention_bias`


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """One model of the family. `num_heads` etc. are the checkpoint's, `heads` the engine's."""

    num_layers: int
    model_dim: int
    hidden_dim: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    heads: HeadLayout
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # [L]
    rope_layers: tuple[bool, ...]  # [L] SmolLM3 leaves some layers without positions
    attention_scale: float
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    tensor: int = 1  # devices the padded sizes divide by

    @property
    def padded_hidden_dim(self) -> int:
        return self.hidden_dim + -self.hidden_dim % self.tensor

    @property
    def padded_vocab_size(self) -> int:
        """Whole registers on each device, unless that is much more.

        A TPU stores a matrix of other widths transposed, and copies it wherever a loop uses it.
        """
        columns = _LANES * self.tensor
        multiple = columns if self.vocab_size >= _MOST_PADDING * columns else self.tensor
        return self.vocab_size + -self.vocab_size % multiple


_COMMON_KEYS = frozenset(
    """
    hidden_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads
    head_dim rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings hidden_act
    attention_bias mlp_bias partial_rotary_factor
    """.split()
)
_WINDOW_KEYS = frozenset(
    {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
)
_KEYS_BY_TYPE: Mapping[str, frozenset[str]] = {
    "llama": frozenset(),
    "mistral": frozenset({"sliding_window", "layer_types"}),
    "qwen2": _WINDOW_KEYS,
    "qwen3": _WINDOW_KEYS,
    "granite": frozenset(
        {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
    ),
    "smollm3": _WINDOW_KEYS | {"no_rope_layers", "no_rope_layer_interval"},
}
_DEFAULTS_BY_TYPE: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "granite": {"attention_multiplier": 1.0},
    "smollm3": {
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
}
"""What a key means that is not there: transformers leaves out some that have these values."""


def config_from_hf(config: Mapping[str, Any], *, tensor: int) -> LlamaConfig:
    """Reads config.json. Raises CheckpointError on a missing size or an unknown switch."""
    model_type = require(config, "model_type")
    if model_type not in _KEYS_BY_TYPE:
        raise CheckpointError(
            f"model_type {model_type!r} of config.json is not one of the Llama family: "
            f"{', '.join(_KEYS_BY_TYPE)}."
        )
    refuse_unknown(config, _COMMON_KEYS | _KEYS_BY_TYPE[model_type])
    config = {**_DEFAULTS_BY_TYPE[model_type], **config}
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise CheckpointError(
            f"hidden_act {activation!r} of config.json is not supported: silu is."
        )
    num_heads, num_kv_heads, head_dim = _head_sizes(config)
    num_layers = int(require(config, "num_hidden_layers"))
    has_bias = bool(config.get("attention_bias"))
    rope_layers = _rope_layers(config, num_layers)
    return LlamaConfig(
        num_layers=num_layers,
        model_dim=int(require(config, "hidden_size")),
        hidden_dim=int(require(config, "intermediate_size")),
        vocab_size=int(require(config, "vocab_size")),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        heads=plan_heads(num_heads=num_heads, num_kv_heads=num_kv_heads, tensor=tensor),
        norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        rope=rope_from_hf(config, head_dim=head_dim),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=has_bias or model_type in QKV_BIAS_TYPES,
        out_bias=has_bias and model_type not in QKV_BIAS_TYPES,
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=model_type in QK_NORM_TYPES,
        windows=_windows(config, model_type, rope_layers),
        rope_layers=rope_layers,
        attention_scale=float(config.get("attention_multiplier") or head_dim**-0.5),
        embedding_multiplier=float(config.get("embedding_multiplier") or 1.0),
        residual_multiplier=float(config.get("residual_multiplier") or 1.0),
        logits_divisor=float(config.get("logits_scaling") or 1.0),
        tensor=tensor,
    )


def _head_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(query heads, KV heads, head dim), which must go into each other."""
    num_heads = int(require(config, "num_attention_heads"))
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads "
            f"{num_kv_heads} in config.json."
        )
    model_dim, head_dim = int(require(config, "hidden_size")), config.get("head_dim")
    if not head_dim and model_dim % num_heads:
        raise CheckpointError(
            f"hidden_size {model_dim} must be a multiple of num_attention_heads {num_heads} in "
            "config.json, which has no head_dim."
        )
    head_dim = int(head_dim or model_dim // num_heads)
    if head_dim % 2:
        raise CheckpointError(
            f"head_dim {head_dim} of config.json must be even: rotary embedding turns pairs."
        )
    return num_heads, num_kv_heads, head_dim


def _windows(
    config: Mapping[str, Any], model_type: str, rope_layers: tuple[bool, ...]
) -> tuple[int | None, ...]:
    """Each layer's sliding window.

    `layer_types` says which layers have one. Without it Mistral's is in all layers, Qwen's in
    those from `max_window_layers` on, SmolLM3's in those without rope.
    """
    num_layers = len(rope_layers)
    layer_types = config.get("layer_types")
    if layer_types and (
        len(layer_types) != num_layers
        or not set(layer_types) <= {"full_attention", "sliding_attention"}
    ):
        raise CheckpointError(
            "layer_types of config.json must name full_attention or sliding_attention for each "
            f"of {num_layers} layers, got {layer_types!r}."
        )
    window = config.get("sliding_window")
    if not window or (model_type != "mistral" and not config.get("use_sliding_window")):
        return (None,) * num_layers
    if layer_types:
        has_window = [kind == "sliding_attention" for kind in layer_types]
    elif model_type == "smollm3":
        has_window = [not uses_rope for uses_rope in rope_layers]
    else:
        first = int(config.get("max_window_layers") or 0)
        has_window = [layer >= first for layer in range(num_layers)]
    return tuple(int(window) if has else None for has in has_window)


def _rope_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """SmolLM3: `no_rope_layers` has a 1 for each layer that *uses* rope, every n-th has none."""
    flags = config.get("no_rope_layers")
    interval = config.get("no_rope_layer_interval")
    if flags:
        if len(flags) != num_layers:
            raise CheckpointError(
                f"no_rope_layers of config.json must have {num_layers} entries, got {len(flags)}."
            )
        return tuple(bool(flag) for flag in flags)
    if interval:
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    return (True,) * num_layers
