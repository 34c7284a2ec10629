"""Orbax checkpoints: written from any other checkpoint, read back one tensor at a time.

A converted model is a directory with config.json, generation_config.json, the tokenizer's files
and `orbax/`, a flat tree of Hugging Face names. Knows no models. Imports jax (through Orbax).
"""

import json
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from jaxinfer.errors import CheckpointError
from jaxinfer.tokenizer.tokenizer import load_tokenizer
from jaxinfer.weights.reader import (
    ORBAX_DIR,
    CheckpointReader,
    ConfigReader,
    TensorInfo,
    read_json_object,
)

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.jinja",
)
"""Files of a model directory that say how text becomes tokens."""


class OrbaxReader(ConfigReader):
    """A directory that `convert_checkpoint` wrote."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._directory = (path / ORBAX_DIR).resolve()
        self._checkpointer = ocp.PyTreeCheckpointer()
        self._lock = threading.Lock()  # a checkpointer keeps state while it restores
        try:
            metadata = self._checkpointer.metadata(self._directory).item_metadata
            if metadata is None:
                raise ValueError("its metadata is missing")
            tree = metadata.tree
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self._directory} is no complete Orbax checkpoint ({error}); convert the model"
                " again"
            ) from error
        self._tensors = {
            name: TensorInfo(shape=tuple(leaf.shape), dtype=np.dtype(leaf.dtype))
            for name, leaf in tree.items()
        }

    def tensors(self) -> dict[str, TensorInfo]:
        return dict(self._tensors)

    def read(self, name: str) -> np.ndarray:
        args = ocp.args.PyTreeRestore(
            item={name: 0},
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,  # this leaf only
        )
        try:
            with self._lock:
                return self._checkpointer.restore(self._directory, args=args)[name]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"tensor {name} of {self._directory} cannot be read: {error}; convert the model"
                " again"
            ) from error

    def close(self) -> None:
        self._checkpointer.close()


def convert_checkpoint(reader: CheckpointReader, out_dir: str | Path) -> None:
    """Write the checkpoint of `reader` as an Orbax model directory.

    `out_dir` must not exist or be empty; it appears only when it is complete. Tensors that a
    reader computes (GGUF) go through files on the same disk, so host memory stays small.
    Raises CheckpointError.
    """
    out_dir = Path(out_dir).absolute()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointError(f"{out_dir} exists and is not empty; name another output directory")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as temporary:
        model_dir = Path(temporary) / "model"
        model_dir.mkdir()
        _write_json(model_dir / "config.json", reader.config())
        _write_tokenizer(reader.path, model_dir)
        _write_generation_config(reader, model_dir / "generation_config.json")
        spill_dir = Path(temporary) / "spill"
        spill_dir.mkdir()
        tree = {name: _on_disk(reader, name, spill_dir) for name in reader.tensors()}
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(model_dir / ORBAX_DIR, tree)
        if out_dir.exists():
            out_dir.rmdir()
        model_dir.rename(out_dir)


def _on_disk(reader: CheckpointReader, name: str, spill_dir: Path) -> np.ndarray:
    """The tensor as a map of a file: the checkpoint's own, or one in `spill_dir`."""
    array = reader.read(name)
    if not array.flags.owndata and not array.flags.writeable:
        return array
    file = spill_dir / f"{len(list(spill_dir.iterdir()))}.bin"
    array.tofile(file)
    return (
        np.asarray(np.memmap(file, dtype=np.uint8, mode="r")).view(array.dtype).reshape(array.shape)
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_generation_config(reader: CheckpointReader, path: Path) -> None:
    """The reader's, under what the tokenizer wrote (it knows all tokens that end an answer)."""
    written = read_json_object(path) if path.exists() else {}
    config = reader.generation_config() | written
    if config:
        _write_json(path, config)


def _write_tokenizer(source: Path, model_dir: Path) -> None:
    if source.is_file():  # a GGUF carries its tokenizer in the file
        load_tokenizer(source).save_json(model_dir)
        return
    files = {file for pattern in TOKENIZER_PATTERNS for file in source.glob(pattern)}
    for file in sorted(files):
        if file.is_dir():
            shutil.copytree(file, model_dir / file.name)
        else:
            shutil.copyfile(file, model_dir / file.name)
