"""A GGUF file's tensors: where each lies, how large it is, and its bytes.

The header is `core/gguf_header.py`'s. Knows no models and no arithmetic; the tables of types and
block sizes are the gguf package's.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxinfer.core.gguf_header import GgufRecord, read_gguf_header
from jaxinfer.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # row-major, as numpy and Hugging Face write it
    offset: int  # bytes from the start of the file
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A parsed file; `data` maps all its bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: np.ndarray

    def raw(self, tensor: GgufTensor) -> np.ndarray:
        """The tensor's bytes, uint8[num_bytes], a view of the file."""
        return self.data[tensor.offset : tensor.offset + tensor.num_bytes]


def read_gguf(path: Path) -> GgufFile:
    """Parse the header and map the file. Raises CheckpointError for anything that is wrong."""
    header = read_gguf_header(path)
    tensors: dict[str, GgufTensor] = {}
    for record in header.tensors:
        if record.name in tensors:
            raise CheckpointError(f"{path} is damaged: it holds tensor {record.name} twice")
        tensors[record.name] = _with_size(path, record)
    _check_size(path, tensors, header.file_bytes)
    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    return GgufFile(path=path, metadata=header.metadata, tensors=tensors, data=data)


def _with_size(path: Path, record: GgufRecord) -> GgufTensor:
    name, shape = record.name, record.shape
    try:
        kind = GGMLQuantizationType(record.kind)
    except ValueError:
        raise CheckpointError(
            f"tensor {name} in {path} has GGML type {record.kind}, which is unknown here"
        ) from None
    block_size, type_size = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block_size:
        raise CheckpointError(
            f"{path} is damaged: rows of tensor {name} have {shape[-1]} elements,"
            f" no multiple of the {block_size} in a block of {kind.name}"
        )
    num_bytes = math.prod(shape) // block_size * type_size
    return GgufTensor(name=name, kind=kind, shape=shape, offset=record.offset, num_bytes=num_bytes)


def _check_size(path: Path, tensors: dict[str, GgufTensor], num_bytes: int) -> None:
    end = max((t.offset + t.num_bytes for t in tensors.values()), default=0)
    if end <= num_bytes:
        return
    cut = sum(t.offset + t.num_bytes > num_bytes for t in tensors.values())
    raise CheckpointError(
        f"{path} is cut short: it has {num_bytes} bytes and its header asks for {end}"
        f" ({cut} of {len(tensors)} tensors are incomplete); download it again"
    )
