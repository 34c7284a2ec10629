"""Architecture name -> model family. One line a family; modules are imported when asked for."""

import importlib
from collections.abc import Mapping
from typing import Any

from jaxinfer.errors import CheckpointError
from jaxinfer.models.base import ModelDef
from jaxinfer.models.hf_config import check_numbers, check_types, list_of, refuse_quantized

FAMILIES = {
    "LlamaForCausalLM": "jaxinfer.models.llama:llama_family",
    "MistralForCausalLM": "jaxinfer.models.llama:llama_family",
    "Qwen2ForCausalLM": "jaxinfer.models.llama:llama_family",
    "Qwen3ForCausalLM": "jaxinfer.models.llama:llama_family",
    "GraniteForCausalLM": "jaxinfer.models.llama:llama_family",
    "SmolLM3ForCausalLM": "jaxinfer.models.llama:llama_family",
}


def define_model(config: Mapping[str, Any], *, tensor: int) -> ModelDef:
    """The model that a config.json describes, laid out for `tensor` devices.

    Raises CheckpointError for an architecture that is not here; the message lists those that are.
    """
    architectures = list_of(str, config, "architectures") or []
    for name in architectures:
        if name in FAMILIES:
            refuse_quantized(config)
            check_numbers(config)
            check_types(config)
            module, function = FAMILIES[name].split(":")
            return getattr(importlib.import_module(module), function)(config, tensor=tensor)
    raise CheckpointError(
        f"architectures {architectures!r} of config.json is not supported; this version serves "
        f"{', '.join(FAMILIES)}."
    )
