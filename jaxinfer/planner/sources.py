"""Finds the configuration of a model without its weights. Downloads nothing; imports no JAX."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from jaxinfer.config.env import cache_dir
from jaxinfer.config.schema import ModelConfig
from jaxinfer.errors import CheckpointError, ModelNotFoundError
from jaxinfer.weights.catalogue import HubSource, load_catalogue

_FILE = "config.json"


def find_config(model: ModelConfig) -> Path:
    """A config.json or a .gguf file of what `model.model` names: a path, else a name whose files
    are on this machine. Raises ModelNotFoundError and CheckpointError."""
    path = Path(model.model).expanduser()
    if path.is_file():
        if path.suffix in (".json", ".gguf"):
            return path
        raise CheckpointError(
            f"model {str(path)!r} is neither a config.json nor a .gguf file: give one of them, or "
            "the directory that holds it."
        )
    if path.is_dir():
        return _in_directory(path)
    for candidate in _of_a_name(model):
        if candidate.is_file():
            return candidate
    raise ModelNotFoundError(
        f"model {model.model!r}: its config.json is not on this machine{_suggestion(model.model)}. "
        "Give the path of that file or of its directory; no weights are needed."
    )


def _in_directory(path: Path) -> Path:
    if (path / _FILE).is_file():
        return path / _FILE
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    raise CheckpointError(
        f"model directory {str(path)!r} has no config.json and {len(files)} .gguf files: give a "
        "directory with config.json, or name one .gguf file."
    )


def _of_a_name(model: ModelConfig) -> list[Path]:
    """Where downloads of the model would lie."""
    entry = load_catalogue().find(model.model)
    if entry is None:
        return _in_hub_cache(model.model, model)
    root = Path(model.download_dir).expanduser() if model.download_dir else cache_dir() / "models"
    found: list[Path] = []
    for source in entry.sources:
        if isinstance(source, HubSource):
            found += _in_hub_cache(source.repo_id, model)
        else:
            found.append(root / entry.name / source.file)
    return found


def _in_hub_cache(repo_id: str, model: ModelConfig) -> list[Path]:
    try:
        path = try_to_load_from_cache(
            repo_id, _FILE, cache_dir=model.download_dir, revision=model.revision
        )
    except HFValidationError:
        return []
    return [Path(path)] if isinstance(path, str) else []


def _suggestion(name: str) -> str:
    catalogue = load_catalogue()
    return "" if catalogue.find(name) is not None else catalogue.suggest(name)
