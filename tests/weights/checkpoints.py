"""Small checkpoints that the tests of this folder write."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from safetensors.numpy import save_file

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8}


def write_shards(
    directory: Path, shards: dict[str, dict[str, np.ndarray]], *, index: bool = True
) -> Path:
    """A Hugging Face directory of the given files (name -> tensors)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    if index:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(text)
    return directory


LLAMA_METADATA = {
    "context_length": 512,
    "embedding_length": 32,
    "block_count": 1,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "vocab_size": 16,
}


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    arch: str = "llama",
    kinds: dict[str, GGMLQuantizationType] | None = None,
    metadata: dict[str, Any] | None = None,
    plain: dict[str, Any] | None = None,
) -> Path:
    """A GGUF file. `kinds` names the type of raw (uint8) tensors, `metadata` goes under the
    architecture's prefix over LLAMA_METADATA (None removes a key), `plain` has full keys."""
    writer = gguf.GGUFWriter(path, arch)
    values = {f"{arch}.{key}": value for key, value in (LLAMA_METADATA | (metadata or {})).items()}
    for key, value in (values | (plain or {})).items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
