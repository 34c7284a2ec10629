"""Reads the key-value block at the head of a GGUF file; knows no tensors and no tokenizer.

The `gguf` package's reader builds a numpy array for every string of a vocabulary, which takes
seconds; this one walks the bytes once (tens of milliseconds), so the HTTP process can use it.
Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from jaxinfer.errors import CheckpointError

_MAGIC = b"GGUF"
_SUPPORTED_VERSIONS = (2, 3)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALAR_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "?",
    10: "Q",
    11: "q",
    12: "d",
}


class _Cursor:
    """Little-endian values, one after the other, out of a byte buffer."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = len(_MAGIC)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._position)
        self._position += struct.calcsize("<" + code)
        return value

    def scalars(self, code: str, count: int) -> list[Any]:
        size = struct.calcsize("<" + code) * count
        self._check_left(size)
        values = struct.unpack_from(f"<{count}{code}", self._data, self._position)
        self._position += size
        return list(values)

    def string(self) -> str:
        length = self.scalar("Q")
        self._check_left(length)
        start = self._position
        self._position = start + length
        return self._data[start : self._position].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item_kind, count = self.scalar("I"), self.scalar("Q")
            if item_kind in _SCALAR_FORMATS:
                return self.scalars(_SCALAR_FORMATS[item_kind], count)
            self._check_left(count)  # every item takes a byte at least
            return [self.value(item_kind) for _ in range(count)]
        return self.scalar(_SCALAR_FORMATS[kind])

    def _check_left(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self._position:
            raise struct.error(f"{num_bytes} bytes wanted beyond the end of the file")


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Key -> value of a GGUF file (arrays as lists).

    Raises CheckpointError for a file that is missing, not GGUF, cut short or of another version.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _read(path, data)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is empty: download it again.") from error
    except (struct.error, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"The metadata of {path} is damaged ({error}): download the file again."
        ) from error


def _read(path: Path, data: mmap.mmap) -> dict[str, Any]:
    if data[: len(_MAGIC)] != _MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file (it does not begin with 'GGUF').")
    cursor = _Cursor(data)
    version = cursor.scalar("I")
    if version not in _SUPPORTED_VERSIONS:
        raise CheckpointError(
            f"{path} has GGUF version {version}; versions {_SUPPORTED_VERSIONS} can be read "
            "(little-endian)."
        )
    cursor.scalar("Q")  # number of tensors
    num_pairs = cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    return metadata
