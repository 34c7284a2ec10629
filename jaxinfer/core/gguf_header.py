"""The head of a GGUF file: metadata, and what it says of each tensor. The one parser of it.

Knows bytes only: no tokenizer, no model, no block sizes, no numpy (the HTTP process reads the
tokenizer through it). The `gguf` package's reader makes several numpy views per metadata element,
seconds for a vocabulary; this walks the bytes once, some tens of milliseconds.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SCALAR_CODES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    _FLOAT32: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MAX_NESTING = 4  # of arrays in arrays; real files have none
_MAX_DIMS = 8
# The fewest bytes of each: a count that cannot be true is seen before a long loop over it.
_MIN_STRING_BYTES, _MIN_ARRAY_BYTES = 8, 12
_MIN_VALUE_BYTES = 8 + 4 + 1
_MIN_RECORD_BYTES = 8 + 4 + 4 + 8


class GgufRecord(NamedTuple):
    """What the header says of one tensor."""

    name: str
    kind: int  # a GGMLQuantizationType, if it is one
    shape: tuple[int, ...]  # row-major, as numpy and Hugging Face write it
    offset: int  # bytes from the start of the file


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """A header that was read whole; its tensors' data may still be cut short."""

    metadata: dict[str, Any]
    tensors: tuple[GgufRecord, ...]
    file_bytes: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Parses the header of `path`.

    Raises CheckpointError that names the file, and its size where it ends too soon.
    """
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{path} is cut short: it has 0 bytes; download it again.") from error
    with buffer:
        return _parse(_Cursor(path, buffer))


def _parse(cursor: "_Cursor") -> GgufHeader:
    num_tensors, num_values = _read_preamble(cursor)
    cursor.expect(num_values * _MIN_VALUE_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.u32())
    cursor.expect(num_tensors * _MIN_RECORD_BYTES)
    records = [_read_record(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise cursor.damage(f"general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufHeader(
        metadata=metadata,
        tensors=tuple(record._replace(offset=data_start + record.offset) for record in records),
        file_bytes=cursor.size,
    )


def _read_preamble(cursor: "_Cursor") -> tuple[int, int]:
    """The numbers of tensors and of metadata values."""
    cursor.check_magic()
    version = cursor.u32()
    if version not in _VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "big-endian" if big_endian else f"GGUF version {version}"
        raise CheckpointError(f"{cursor.path} is {what}; little-endian versions 2 and 3 are read.")
    return cursor.u64(), cursor.u64()


def _read_record(cursor: "_Cursor") -> GgufRecord:
    """A tensor's record, its offset still from the start of the data."""
    name = cursor.string()
    num_dims = cursor.u32()
    if num_dims > _MAX_DIMS:
        raise cursor.damage(f"tensor {name} has {num_dims} dimensions")
    dims = [cursor.u64() for _ in range(num_dims)]
    kind = cursor.u32()
    return GgufRecord(name=name, kind=kind, shape=tuple(reversed(dims)), offset=cursor.u64())


class _Cursor:
    """Little-endian values, one after the other; the end of the file is a CheckpointError."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self.size = len(buffer)
        self._buffer = buffer

    def damage(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged: {what} (near byte {self.position} of {self.size}); "
            "download it again."
        )

    def cut_short(self, end: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is cut short: it has {self.size} bytes and its header needs at least "
            f"{end}; download it again."
        )

    def expect(self, num_bytes: int) -> int:
        """The position, from which `num_bytes` must exist."""
        if num_bytes > self.size - self.position:
            raise self.cut_short(self.position + num_bytes)
        return self.position

    def check_magic(self) -> None:
        start = self._buffer[: len(_MAGIC)]
        if not _MAGIC.startswith(start):
            raise CheckpointError(
                f"{self.path} is not a GGUF file (it does not begin with 'GGUF')."
            )
        self.position = self.expect(len(_MAGIC)) + len(_MAGIC)

    def u32(self) -> int:
        (value,) = _U32.unpack_from(self._buffer, self.expect(_U32.size))
        self.position += _U32.size
        return value

    def u64(self) -> int:
        (value,) = _U64.unpack_from(self._buffer, self.expect(_U64.size))
        self.position += _U64.size
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """One loop without calls: a vocabulary has a hundred thousand strings."""
        self.expect(count * _MIN_STRING_BYTES)
        texts: list[str] = []
        buffer, size, unpack = self._buffer, self.size, _U64.unpack_from
        position = self.position
        for _ in range(count):
            start = position + 8
            position = start + unpack(buffer, position)[0] if start <= size else start
            if position > size:
                raise self.cut_short(position)
            try:
                texts.append(buffer[start:position].decode())
            except UnicodeDecodeError as error:
                self.position = start
                raise self.damage("a string in it is not UTF-8") from error
        self.position = position
        return texts

    def scalars(self, kind: int, count: int) -> list[Any]:
        code = _SCALAR_CODES[kind]
        start = self.expect(struct.calcsize("<" + code) * count)
        values = struct.unpack_from(f"<{count}{code}", self._buffer, start)
        self.position += struct.calcsize("<" + code) * count
        return [_shortest(value) for value in values] if kind == _FLOAT32 else list(values)

    def value(self, kind: int, *, nesting: int = 0) -> Any:
        """A metadata value; an array is a list."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALAR_CODES:
            return self.scalars(kind, 1)[0]
        if kind != _ARRAY or nesting >= _MAX_NESTING:
            raise self.damage(f"metadata type {kind} does not exist or is nested too deeply")
        element, count = self.u32(), self.u64()
        if element == _STRING:
            return self.strings(count)
        if element in _SCALAR_CODES:
            return self.scalars(element, count)
        self.expect(count * _MIN_ARRAY_BYTES)
        return [self.value(element, nesting=nesting + 1) for _ in range(count)]


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, as it was written, not 9.99999974e-06."""
    if value.is_integer() and abs(value) < 2**24:  # scores, mostly: a vocabulary of them
        return value
    exact = struct.pack("<f", value)
    for digits in (6, 7, 8):
        rounded = float(f"{value:.{digits}g}")
        if struct.pack("<f", rounded) == exact:
            return rounded
    return float(f"{value:.9g}")  # tells all float32 apart
