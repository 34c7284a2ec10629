"""GGUF metadata -> the Hugging Face config.json the model was converted from, as far as needed.

Knows the architectures that can be read and what llama.cpp's converter writes for them
(https://github.com/ggml-org/llama.cpp, conversion/). Knows no tensor data but the rope factors.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from jaxinfer.errors import CheckpointError
from jaxinfer.weights.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
_SMOLLM3_NOPE_INTERVAL = 4  # not in the metadata: llama.cpp has it in code


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """What a `general.architecture` stands for."""

    hf_class: str
    model_type: str
    permuted: bool  # rows of q and k are reordered for rotary pairs (2i, 2i+1)


ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture(hf_class="LlamaForCausalLM", model_type="llama", permuted=True),
    "qwen2": GgufArchitecture(hf_class="Qwen2ForCausalLM", model_type="qwen2", permuted=False),
    "qwen3": GgufArchitecture(hf_class="Qwen3ForCausalLM", model_type="qwen3", permuted=False),
    "granite": GgufArchitecture(hf_class="GraniteForCausalLM", model_type="granite", permuted=True),
    "smollm3": GgufArchitecture(hf_class="SmolLM3ForCausalLM", model_type="smollm3", permuted=True),
}
"""llama covers Llama, Mistral and SmolLM(2)."""


@dataclass(frozen=True, kw_only=True)
class _Metadata:
    """Lookups under the architecture's prefix, with errors that name the key."""

    file: GgufFile
    arch: str

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: int | None = None) -> Any:
        """One number that holds for all layers."""
        value = self.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise CheckpointError(
                    f"{self.file.path}: {self.arch}.{key} differs between layers ({value[:8]});"
                    " such models are not supported"
                )
            value = value[0]
        if not isinstance(value, int | float):
            raise CheckpointError(
                f"{self.file.path} lacks the metadata {self.arch}.{key}; convert the model again"
            )
        return value


def find_architecture(file: GgufFile) -> GgufArchitecture:
    """The file's architecture; CheckpointError with the supported ones for any other."""
    name = file.metadata.get("general.architecture")
    known = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if known is None:
        raise CheckpointError(
            f"{file.path} has architecture {name!r}, which is not supported as GGUF;"
            f" supported: {', '.join(sorted(ARCHITECTURES))} (others: the model's safetensors)"
        )
    if file.metadata.get(f"{name}.expert_count"):
        raise CheckpointError(
            f"{file.path} is a mixture of experts ({name}.expert_count ="
            f" {file.metadata[f'{name}.expert_count']}), which is not supported as GGUF"
        )
    if file.metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{file.path} is one of {file.metadata['split.count']} parts; join them:"
            f" llama-gguf-split --merge {file.path.name} merged.gguf"
        )
    return known


def build_config(file: GgufFile) -> dict[str, Any]:
    """A config.json for the file, in transformers 5 form (`rope_parameters`)."""
    arch = find_architecture(file)
    meta = _Metadata(file=file, arch=file.metadata["general.architecture"])
    hidden_size = meta.number("embedding_length")
    num_heads = meta.number("attention.head_count")
    head_dim = meta.get("attention.key_length", hidden_size // num_heads)
    embedding = file.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": meta.number("feed_forward_length"),
        "num_hidden_layers": meta.number("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.number("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta.number("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(file, meta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "vocab_size": embedding.shape[0] if embedding else meta.number("vocab_size"),
        "dtype": _stored_dtype(file),
    }
    config.update(_special_tokens(file.metadata))
    config.update(_family_fields(meta, config))
    return config


def build_generation_config(file: GgufFile) -> dict[str, Any]:
    """bos, eos (all tokens that end an answer) and pad ids; GGUF has no sampling defaults."""
    config = _special_tokens(file.metadata)
    ends = [file.metadata.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")]
    unique = list(dict.fromkeys(token for token in ends if token is not None))
    if len(unique) > 1:
        config["eos_token_id"] = unique
    return config


def _special_tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in keys.items()}
    return {key: value for key, value in found.items() if value is not None}


def _family_fields(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """What only some families have."""
    window = meta.get("attention.sliding_window")
    if meta.arch == "llama" and window:
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": window,
        }
    if meta.arch == "granite":
        return {
            "embedding_multiplier": meta.get("embedding_scale", 1.0),
            "residual_multiplier": meta.get("residual_scale", 1.0),
            "attention_multiplier": meta.get("attention.scale") or config["head_dim"] ** -0.5,
            "logits_scaling": meta.get("logit_scale", 1.0),
        }
    if meta.arch == "smollm3":
        interval = _SMOLLM3_NOPE_INTERVAL
        layers = range(1, config["num_hidden_layers"] + 1)
        return {
            "no_rope_layer_interval": interval,
            "no_rope_layers": [int(layer % interval != 0) for layer in layers],
            "use_sliding_window": False,
        }
    return {}


def _stored_dtype(file: GgufFile) -> str:
    """The computation type to prefer: float32 only for a file that is float32 throughout.

    Not float16 for F16 files: quantized and half files were mostly made from bfloat16 models,
    whose activations may exceed float16's range.
    """
    kinds = {tensor.kind for tensor in file.tensors.values()}
    return "float32" if kinds == {GGMLQuantizationType.F32} else "bfloat16"


def _rope_parameters(file: GgufFile, meta: _Metadata, head_dim: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": meta.get("rope.freq_base", 10000.0),
    }
    rotary_dim = meta.get("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        parameters["partial_rotary_factor"] = rotary_dim / head_dim
    if ROPE_FACTORS in file.tensors:
        return parameters | _llama3_scaling(file, parameters["rope_theta"])
    scaling = meta.get("rope.scaling.type", "none")
    if scaling == "none":
        return parameters
    parameters |= {"rope_type": scaling, "factor": meta.get("rope.scaling.factor", 1.0)}
    optional = {
        "original_max_position_embeddings": "original_context_length",
        "attention_factor": "attn_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    found = {key: meta.get(f"rope.scaling.{name}") for key, name in optional.items()}
    return parameters | {key: value for key, value in found.items() if value is not None}


def llama3_factors(
    *, rope_theta: float, num_factors: int, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """By what llama3 rope scaling divides each frequency, float64[num_factors].

    Wavelengths below original/high stay, those above original/low are stretched by `factor`, and
    between them the frequency is interpolated (Llama 3.1 model card; transformers'
    `_compute_llama3_parameters`).
    """
    exponents = np.arange(num_factors) / num_factors
    wavelengths = 2 * math.pi * rope_theta**exponents
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _llama3_scaling(file: GgufFile, rope_theta: float) -> dict[str, Any]:
    """The llama3 parameters that give the file's factors.

    The converter stores only the result. The stretch is its largest value, low and high are 1
    and 4 in every published model, and the original length is the power of two that fits.
    """
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.kind != GGMLQuantizationType.F32:
        raise CheckpointError(f"{file.path}: {ROPE_FACTORS} is {tensor.kind.name}, expected F32")
    stored = file.raw(tensor).view(np.float32)
    factor = float(stored.max())
    low, high = 1.0, 4.0
    for original in (2**power for power in range(10, 21)):
        expected = llama3_factors(
            rope_theta=rope_theta,
            num_factors=stored.size,
            factor=factor,
            low=low,
            high=high,
            original=original,
        )
        if np.allclose(expected, stored, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{file.path}: the factors in {ROPE_FACTORS} are not those of llama3 rope scaling;"
        " use the model's safetensors"
    )
