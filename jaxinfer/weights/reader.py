"""What every checkpoint format offers: Hugging Face names, one tensor at a time, in host memory.

Knows which reader serves which directory or file. Knows no devices, no models and no network.
"""

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.errors import CheckpointError

ORBAX_DIR = "orbax"
"""Subdirectory of a converted model that holds the Orbax checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype  # of the array that `read` returns

    @property
    def num_bytes(self) -> int:
        """Host memory that `read` needs for it, where it copies."""
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointReader(ABC):
    """A checkpoint opened for reading. Thread-safe: several threads may `read` at once."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The directory or file, for messages."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Content of the Hugging Face `config.json`."""

    @abstractmethod
    def generation_config(self) -> dict[str, Any]:
        """Content of `generation_config.json`; empty where there is none."""

    @abstractmethod
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by their Hugging Face names."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor of `tensors()`; read-only, a view of the file where the format allows it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files. Arrays that were read stay valid."""


class ConfigReader(CheckpointReader):
    """A model directory of which only the configuration matters, as for dummy weights."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        return self._path

    def config(self) -> dict[str, Any]:
        return read_json_object(self._path / "config.json")

    def generation_config(self) -> dict[str, Any]:
        file = self._path / "generation_config.json"
        return read_json_object(file) if file.exists() else {}

    def tensors(self) -> dict[str, TensorInfo]:
        return {}

    def read(self, name: str) -> np.ndarray:
        raise CheckpointError(f"{self._path} was opened without weights; {name} cannot be read")

    def close(self) -> None:
        """Nothing is open."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError names the file when it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: a model directory needs it; download the model again"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def detect_format(path: Path) -> str:
    """ "gguf", "orbax" or "safetensors": what the directory or file holds."""
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        raise CheckpointError(f"{path} is not a .gguf file; name a .gguf file or a model directory")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    if (path / ORBAX_DIR).is_dir():
        return "orbax"
    return "safetensors"


def open_checkpoint(path: str | Path, load_format: str = "auto") -> CheckpointReader:
    """Open a model directory or .gguf file.

    `load_format` "auto" looks at what is there, "dummy" needs no weights to be there (then
    `tensors()` may be empty), and another one insists. Raises CheckpointError.
    """
    path = Path(path)
    found = detect_format(path)
    if load_format == "dummy" and found == "safetensors":
        return ConfigReader(path)
    if load_format not in ("auto", "dummy", found):
        raise CheckpointError(
            f"load_format is {load_format!r} but {path} holds {found};"
            f" use --load-format {found} or auto"
        )
    if found == "gguf":
        from jaxinfer.weights.gguf import GgufReader

        return GgufReader(path)
    if found == "orbax":  # imports jax
        from jaxinfer.weights.orbax import OrbaxReader

        return OrbaxReader(path)
    from jaxinfer.weights.safetensors import SafetensorsReader

    return SafetensorsReader(path)
