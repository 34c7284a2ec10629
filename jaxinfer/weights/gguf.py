"""GGUF files as checkpoints: Hugging Face names and layouts, dequantized tensor by tensor.

Knows llama.cpp's tensor names and its reordering of q and k rows. Metadata is gguf_config's,
the container gguf_file's, and the arithmetic of the quantized types the gguf package's.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxinfer.errors import CheckpointError
from jaxinfer.weights.gguf_config import (
    ROPE_FACTORS,
    build_config,
    build_generation_config,
    find_architecture,
)
from jaxinfer.weights.gguf_file import GgufTensor, read_gguf
from jaxinfer.weights.reader import CheckpointReader, TensorInfo

_Kind = GGMLQuantizationType

_PLAIN: dict[_Kind, np.dtype] = {
    _Kind.F32: np.dtype(np.float32),
    _Kind.F16: np.dtype(np.float16),
    _Kind.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED = (
    _Kind.Q8_0,
    _Kind.Q4_0,
    _Kind.Q4_1,
    _Kind.Q5_0,
    _Kind.Q5_1,
    _Kind.Q4_K,
    _Kind.Q5_K,
    _Kind.Q6_K,
)
# gguf's dequantize works on 16 rows at a time. Rows this long keep its Python overhead small, and
# its temporaries in the processor's cache (measured: four times faster than 64 such rows).
_ROW_ELEMENTS = 8192
_ROWS_AT_ONCE = 16

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a Hugging Face tensor comes from."""

    tensor: GgufTensor
    num_permuted_heads: int  # 0: rows are in order


class GgufReader(CheckpointReader):
    """One .gguf file."""

    def __init__(self, path: Path) -> None:
        self._file = read_gguf(path)
        self._architecture = find_architecture(self._file)
        self._config = build_config(self._file)
        self._refuse_unknown_kinds()
        self._sources = {
            to_hf_name(tensor.name): _Source(
                tensor=tensor, num_permuted_heads=self._count_permuted_heads(tensor.name)
            )
            for tensor in self._file.tensors.values()
            if tensor.name != ROPE_FACTORS  # part of the config
        }

    @property
    def path(self) -> Path:
        return self._file.path

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    def generation_config(self) -> dict[str, Any]:
        return build_generation_config(self._file)

    def tensors(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(
                shape=source.tensor.shape,
                dtype=_PLAIN.get(source.tensor.kind, np.dtype(np.float32)),
            )
            for name, source in self._sources.items()
        }

    def read(self, name: str) -> np.ndarray:
        source = self._sources[name]
        tensor = source.tensor
        raw = self._file.raw(tensor)
        if source.num_permuted_heads:
            raw = restore_head_rows(raw, num_heads=source.num_permuted_heads, shape=tensor.shape)
        plain = _PLAIN.get(tensor.kind)
        if plain is not None:
            return raw.view(plain).reshape(tensor.shape)
        return _dequantize(raw, tensor.kind).reshape(tensor.shape)

    def close(self) -> None:
        """The map of the file goes when the last array that views it goes."""

    def _refuse_unknown_kinds(self) -> None:
        refused = [
            tensor
            for tensor in self._file.tensors.values()
            if tensor.kind not in _PLAIN and tensor.kind not in _QUANTIZED
        ]
        if not refused:
            return
        kinds = ", ".join(sorted({tensor.kind.name for tensor in refused}))
        supported = ", ".join(kind.name for kind in (*_PLAIN, *_QUANTIZED))
        raise CheckpointError(
            f"{self.path} has {len(refused)} tensors of type {kinds} (first: {refused[0].name}),"
            f" which is not supported; supported: {supported}; requantize the model with"
            " llama-quantize"
        )

    def _count_permuted_heads(self, name: str) -> int:
        if not self._architecture.permuted:
            return 0
        match = _LAYER_PATTERN.fullmatch(name)
        if match is None:
            return 0
        key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(match[2])
        return self._config[key] if key else 0


def to_hf_name(name: str) -> str:
    """llama.cpp's tensor name in Hugging Face naming; a name unknown here stays as it is.

    The loader then lists it among the left-over tensors.
    """
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = _LAYER_PATTERN.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return name
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def restore_head_rows(raw: np.ndarray, *, num_heads: int, shape: tuple[int, ...]) -> np.ndarray:
    """Undo the converter's reordering of the rows of q and k, on the (quantized) bytes.

    Hugging Face rotates the pairs (i, i + H/2) of a head, llama.cpp's "normal" rope the pairs
    (2i, 2i+1), so its converter interleaves the two halves of each head's rows
    (`LlamaModel.permute` in llama.cpp's conversion/llama.py). Blocks never cross rows, so rows
    of any type may be moved. Returns uint8 of the same size, a copy.
    """
    if shape[0] % (2 * num_heads):
        raise CheckpointError(f"a tensor of {shape[0]} rows cannot be {num_heads} rotary heads")
    rows = raw.reshape(num_heads, shape[0] // num_heads // 2, 2, -1)
    return rows.swapaxes(1, 2).reshape(-1)


def _dequantize(raw: np.ndarray, kind: _Kind) -> np.ndarray:
    """float32 values of the blocks in `raw`, flat."""
    block_size, type_size = GGML_QUANT_SIZES[kind]
    num_blocks = raw.size // type_size
    per_row = next(
        n
        for n in range(min(num_blocks, max(1, _ROW_ELEMENTS // block_size)), 0, -1)
        if num_blocks % n == 0
    )
    rows = raw.reshape(-1, per_row * type_size)
    values = np.empty((rows.shape[0], per_row * block_size), np.float32)
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        chunk = slice(start, start + _ROWS_AT_ONCE)
        values[chunk] = dequantize(rows[chunk], kind)
    return values.reshape(-1)
