"""The GGUF container: metadata and where each tensor lies. Knows no models and no arithmetic.

gguf.GGUFReader makes several numpy views per metadata element: seconds for a vocabulary. This
reads the same header with `struct` in a tenth of the time and tells a file that was cut short
from a damaged one. The tables of types and block sizes are the gguf package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)

from jaxinfer.errors import CheckpointError

_SCALARS: dict[GGUFValueType, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}
_VERSIONS = (2, 3)


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


class _Cursor:
    """Reads little-endian values from a buffer; the end of the buffer is a CheckpointError."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self._buffer = buffer
        self._size = len(buffer)

    def skip(self, num_bytes: int) -> int:
        """The position before num_bytes, which must exist, are passed over."""
        start = self.position
        if num_bytes > self._size - start:
            raise CheckpointError(
                f"{self.path} is cut short: it ends after {self._size} bytes, inside its header;"
                " download it again"
            )
        self.position = start + num_bytes
        return start

    def u32(self) -> int:
        return struct.unpack_from("<I", self._buffer, self.skip(4))[0]

    def u64(self) -> int:
        return struct.unpack_from("<Q", self._buffer, self.skip(8))[0]

    def string(self) -> str:
        length = self.u64()
        start = self.skip(length)
        try:
            return self._buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: a string in it is no UTF-8") from error

    def scalars(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = _SCALARS[kind]
        start = self.skip(count * dtype.itemsize)
        values = np.frombuffer(self._buffer, dtype=dtype, count=count, offset=start)
        if kind == GGUFValueType.FLOAT32:
            # The shortest decimal: 1e-05, as the model's author wrote it, not 9.99999974e-06.
            return [float(str(value)) for value in values]
        return values.tolist()

    def value_kind(self) -> GGUFValueType:
        number = self.u32()
        try:
            return GGUFValueType(number)
        except ValueError:
            raise CheckpointError(
                f"{self.path} is damaged: metadata type {number} does not exist"
            ) from None

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalars(kind, 1)[0]
        element = self.value_kind()
        count = self.u64()
        if element == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        if element == GGUFValueType.ARRAY:
            raise CheckpointError(f"{self.path}: arrays of arrays in metadata are not supported")
        return self.scalars(element, count)


def read_gguf(path: Path) -> GgufFile:
    """Parse the header and map the file. Raises CheckpointError for anything that is wrong."""
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    cursor = _Cursor(path, buffer)
    num_tensors, num_values = _read_preamble(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.value_kind())
    records = [_read_tensor_record(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise CheckpointError(f"{path} is damaged: general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in records:
        if name in tensors:
            raise CheckpointError(f"{path} is damaged: it holds tensor {name} twice")
        tensors[name] = _locate(path, name, shape=shape, kind=kind, offset=data_start + offset)
    _check_size(path, tensors, len(buffer))
    data = np.frombuffer(buffer, dtype=np.uint8)
    return GgufFile(path=path, metadata=metadata, tensors=tensors, data=data)


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of metadata values."""
    magic = cursor.u32()
    if magic != GGUF_MAGIC:
        raise CheckpointError(f"{cursor.path} is not a GGUF file (it does not begin with 'GGUF')")
    version = cursor.u32()
    if version not in _VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "big-endian" if big_endian else f"GGUF version {version}"
        raise CheckpointError(f"{cursor.path} is {what}; little-endian versions 2 and 3 are read")
    return cursor.u64(), cursor.u64()


def _read_tensor_record(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dims = cursor.u32()
    if num_dims > 8:
        raise CheckpointError(f"{cursor.path} is damaged: tensor {name} has {num_dims} dimensions")
    dims = [cursor.u64() for _ in range(num_dims)]
    kind = cursor.u32()
    return name, tuple(reversed(dims)), kind, cursor.u64()


def _locate(path: Path, name: str, *, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(
            f"tensor {name} in {path} has GGML type {kind}, which is unknown here"
        ) from None
    block_size, type_size = GGML_QUANT_SIZES[known]
    num_elements = 1
    for dim in shape:
        num_elements *= dim
    if shape and shape[-1] % block_size:
        raise CheckpointError(
            f"{path} is damaged: rows of tensor {name} have {shape[-1]} elements,"
            f" no multiple of the {block_size} in a block of {known.name}"
        )
    num_bytes = num_elements // block_size * type_size
    return GgufTensor(name=name, kind=known, shape=shape, offset=offset, num_bytes=num_bytes)


def _check_size(path: Path, tensors: dict[str, GgufTensor], num_bytes: int) -> None:
    end = max((t.offset + t.num_bytes for t in tensors.values()), default=0)
    if end <= num_bytes:
        return
    cut = sum(t.offset + t.num_bytes > num_bytes for t in tensors.values())
    raise CheckpointError(
        f"{path} is cut short: it has {num_bytes} bytes and its header asks for {end}"
        f" ({cut} of {len(tensors)} tensors are incomplete); download it again"
    )
