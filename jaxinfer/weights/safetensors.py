"""Hugging Face model directories: config.json and one or more safetensors files.

The safetensors library checks each file's header. Tensors are then read-only memory maps at the
offsets of that header, because the library copies each tensor and its numpy side knows no fp8.
Format: https://github.com/huggingface/safetensors#format. Knows no models and no devices.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxinfer.errors import CheckpointError
from jaxinfer.weights.reader import ConfigReader, TensorInfo, read_json_object

INDEX_FILE = "model.safetensors.index.json"
_LENGTH_BYTES = 8  # a little-endian uint64 before the header: its length

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Where one tensor lies."""

    file: Path
    info: TensorInfo
    offset: int  # bytes from the start of the file


class SafetensorsReader(ConfigReader):
    """A model directory with safetensors files."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._entries = _scan_directory(path)
        files = {entry.file for entry in self._entries.values()}
        self._maps = {file: np.memmap(file, dtype=np.uint8, mode="r") for file in sorted(files)}

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: entry.info for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        raw = self._maps[entry.file][entry.offset : entry.offset + entry.info.num_bytes]
        return np.asarray(raw).view(entry.info.dtype).reshape(entry.info.shape)

    def close(self) -> None:
        self._maps.clear()


def _scan_directory(path: Path) -> dict[str, _Entry]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    if (path / INDEX_FILE).exists():
        return _scan_indexed(path)
    single = path / "model.safetensors"
    if single.exists():
        return _scan_file(single)
    # "consolidated" files are a second copy in another naming that Mistral's repositories carry.
    files = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith("consolidated"))
    if not files:
        raise CheckpointError(_describe_no_weights(path))
    entries: dict[str, _Entry] = {}
    for file in files:
        for name, entry in _scan_file(file).items():
            if name in entries:
                raise CheckpointError(
                    f"tensor {name} is both in {entries[name].file.name} and in {file.name} of"
                    f" {path}: files of two checkpoints are mixed; remove one, or add {INDEX_FILE}"
                )
            entries[name] = entry
    return entries


def _describe_no_weights(path: Path) -> str:
    message = f"{path} holds no *.safetensors file"
    if any(path.glob("*.bin")) or any(path.glob("*.pth")):
        return message + (
            ", only PyTorch pickles, which run code when loaded and are refused; convert them:"
            " transformers' model.save_pretrained(DIR)"
        )
    return message + "; name a complete model directory, or download the model again"


def _scan_indexed(path: Path) -> dict[str, _Entry]:
    index_path = path / INDEX_FILE
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index_path} has no usable 'weight_map' of tensor names to files")
    file_names = sorted(set(weight_map.values()))
    missing = [name for name in file_names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(file_names)} shards that {INDEX_FILE} names:"
            f" {', '.join(missing[:20])}; download them again"
        )
    by_file = {name: _scan_file(path / name) for name in file_names}
    absent = sorted(tensor for tensor, file in weight_map.items() if tensor not in by_file[file])
    if absent:
        named = ", ".join(f"{tensor} ({weight_map[tensor]})" for tensor in absent[:20])
        raise CheckpointError(
            f"{INDEX_FILE} of {path} names {len(absent)} tensors that their shards do not hold:"
            f" {named}; index and shards are of different checkpoints"
        )
    return {tensor: by_file[file][tensor] for tensor, file in weight_map.items()}


def _scan_file(path: Path) -> dict[str, _Entry]:
    num_bytes = path.stat().st_size
    header, data_start = _read_header(path, num_bytes)
    try:
        with safe_open(path, framework="np"):  # the library's checks: overlaps, gaps, sizes
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
    entries: dict[str, _Entry] = {}
    for name, record in header.items():
        dtype = _DTYPES.get(record["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"tensor {name} in {path} has type {record['dtype']}, which is not supported;"
                f" supported: {', '.join(_DTYPES)}"
            )
        info = TensorInfo(shape=tuple(record["shape"]), dtype=dtype)
        offset = data_start + record["data_offsets"][0]
        entries[name] = _Entry(file=path, info=info, offset=offset)
    return entries


def _read_header(path: Path, num_bytes: int) -> tuple[dict[str, dict[str, Any]], int]:
    """The header's records and where the data starts; a file cut short is told from a wrong one."""
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        if start.startswith(b"version"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull`")
        header_length = int.from_bytes(start, "little")
        data_start = _LENGTH_BYTES + header_length
        if data_start > num_bytes or len(start) < _LENGTH_BYTES:
            raise CheckpointError(
                f"{path} ({num_bytes} bytes) ends inside its header: it is cut short or no"
                " safetensors file; download it again"
            )
        raw = file.read(header_length)
    try:
        header: dict[str, dict[str, Any]] = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((record["data_offsets"][1] for record in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} has no valid safetensors header: {error}") from error
    if data_start + end > num_bytes:
        raise CheckpointError(
            f"{path} is cut short: it has {num_bytes} bytes and its header asks for"
            f" {data_start + end}; download it again"
        )
    return header, data_start
