"""jaxinfer: a JAX/XLA-first LLM inference engine. The public names; importing it imports no JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.core.outputs import CompletionOutput, RequestOutput
    from jaxinfer.core.sampling_params import SamplingParams
    from jaxinfer.engine.async_engine import AsyncEngine
    from jaxinfer.engine.offline import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "LLM": "jaxinfer.engine.offline",
    "AsyncEngine": "jaxinfer.engine.async_engine",
    "CompletionOutput": "jaxinfer.core.outputs",
    "RequestOutput": "jaxinfer.core.outputs",
    "SamplingParams": "jaxinfer.core.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
