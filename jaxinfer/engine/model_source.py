"""Finds a model's files and reads its tokenizer: what both AsyncEngine and LLM need first.

Imports no JAX. Knows configuration, hub and tokenizer; nothing of engines.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.config.schema import EngineConfig, ModelConfig
from jaxinfer.core.progress import ProgressCallback
from jaxinfer.core.sampling_params import SamplingParams, model_defaults
from jaxinfer.errors import ConfigError, RequestError
from jaxinfer.tokenizer.tokenizer import Tokenizer, load_tokenizer
from jaxinfer.weights.hub import locate_model, locate_tokenizer


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """`name` is what users call the model."""

    tokenizer: Tokenizer
    name: str


def load_model_tokenizer(config: EngineConfig, on_progress: ProgressCallback) -> LoadedModel:
    """Finds (or downloads) the model and loads its tokenizer; raises UserError."""
    model = config.model
    location = locate_model(model, on_progress)
    path = locate_tokenizer(model, on_progress) or location.path
    tokenizer = load_tokenizer(path, chat_template=model.chat_template)
    _use_once(tokenizer)
    return LoadedModel(tokenizer=tokenizer, name=location.name)


def _use_once(tokenizer: Tokenizer) -> None:
    """What a first use prepares (mostly the chat template, 10 ms) no request shall wait for."""
    text = "Hello"
    if tokenizer.has_chat_template:
        with suppress(RequestError):  # a template may want other messages
            text = tokenizer.render_chat([{"role": "user", "content": text}])
    tokenizer.decode(tokenizer.encode(text))


def sampling_defaults(tokenizer: Tokenizer, model: ModelConfig) -> dict[str, Any]:
    """The sampling fields that --generation-config chooses; raises ConfigError.

    They are checked here, so that no request is told off for what a file says.
    """
    defaults = _read_defaults(tokenizer, model)
    try:
        SamplingParams(**_as_params(defaults))
    except RequestError as error:
        raise ConfigError(
            f"--generation-config={model.generation_config}: generation_config.json is wrong: "
            f"{error} Repair the file, or use --generation-config vllm for neutral defaults."
        ) from error
    return defaults


def _as_params(defaults: dict[str, Any]) -> dict[str, Any]:
    names = {"max_new_tokens": "max_tokens"}
    return {names.get(key, key): value for key, value in defaults.items()}


def _read_defaults(tokenizer: Tokenizer, model: ModelConfig) -> dict[str, Any]:
    if model.generation_config == "auto":
        return tokenizer.sampling_defaults()
    if model.generation_config == "vllm":
        return {}
    path = Path(model.generation_config) / "generation_config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--generation-config={model.generation_config}: cannot read {path}: {error}. Give "
            "auto, vllm or a directory that holds a generation_config.json."
        ) from error
    return model_defaults(fields)


def default_sampling_params(tokenizer: Tokenizer, model: ModelConfig) -> SamplingParams:
    """Sampling as the model's generation_config.json wants it (--generation-config)."""
    return SamplingParams(**_as_params(sampling_defaults(tokenizer, model)))
