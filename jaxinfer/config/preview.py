"""What a configuration comes to, as YAML, before any device or weights are looked at.

For --dry-run. Every setting stands in it; one that is left to be chosen has a comment that says
what will be chosen, or from what, and is chosen already where that can be known here. Read again
with --config, the text means the same. Knows the files of a local model's configuration by name;
nothing of devices.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxinfer.config.fields import build, flatten
from jaxinfer.config.resolve import Choice, DeviceFacts, ModelFacts, Resolution, resolve
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.gguf_header import read_gguf_header
from jaxinfer.errors import CheckpointError, ConfigError

_PLAIN = re.compile(r"[\w./~-]+")
_ENDLESS = 2**31 - 1
_PLATFORMS = ("cpu", "gpu", "tpu")
_SECRETS = ("api_key",)
# Lengths that no setting is above, and that differ: what follows from a length is not known.
_POSSIBLE_MODELS = [
    ModelFacts(max_position_embeddings=length, dtype=dtype)
    for length in (2**61, 2**62)
    for dtype in ("float32", "float16", "bfloat16")
]

OPEN = {
    "device": "what JAX finds at the start",
    "dtype": "float32 on a CPU, bfloat16 on a TPU, on a GPU the checkpoint's if it has 16 bits",
    "kv_cache_dtype": "the dtype",
    "attention_backend": "the best that the device has",
    "max_model_len": "the model's max_position_embeddings",
    "max_num_seqs": "64 on a CPU, 256 elsewhere",
    "max_num_batched_tokens": "512 on a CPU, 2048 on a TPU, 8192 on a GPU",
    "kv_cache_memory_bytes": "what gpu_memory_utilization leaves",
    "num_gpu_blocks_override": "as many pages as fit",
    "token_buckets": "made from max_num_seqs and max_num_batched_tokens",
    "load_format": "told from the files",
    "generation_config": "the model's own",
    "tokenizer": "the model's",
    "download_dir": "the cache directory",
    "chat_template": "the tokenizer's",
    "served_model_name": "the model's",
    "concurrency": "twice max_num_seqs",
}
"""Setting -> what it comes to when it is left open."""


class _Shown(NamedTuple):
    value: Any
    comment: str


def local_model_facts(model: str) -> ModelFacts | None:
    """What the configuration of a model on this machine says; None for one that is not here."""
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _directory_facts(json.loads((path / "config.json").read_text("utf-8")))
        if path.suffix == ".gguf" and path.is_file():
            return _gguf_facts(read_gguf_header(path).metadata)
    except (OSError, ValueError, CheckpointError):
        return None  # the start itself says what is wrong with it
    return None


def _directory_facts(config: Any) -> ModelFacts | None:
    length = config.get("max_position_embeddings") if isinstance(config, dict) else None
    if not isinstance(length, int):
        return None
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return ModelFacts(max_position_embeddings=length, dtype=str(dtype))


def _gguf_facts(metadata: Mapping[str, Any]) -> ModelFacts | None:
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if not isinstance(length, int):
        return None
    return ModelFacts(max_position_embeddings=length, dtype="a GGUF format")


def preview(
    engine: EngineConfig,
    rest: Mapping[str, Any],
    *,
    model: ModelFacts | None,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The YAML. `rest` are settings beside the engine's, `sections` nested ones after them.

    Raises ConfigError where settings contradict the model, or each other.
    """
    shown = {name: _as_given(name, value) for name, value in {**flatten(engine), **rest}.items()}
    shown |= _chosen(engine, model)
    lines = [_line(name, *item) for name, item in shown.items()]
    for section, values in (sections or {}).items():
        lines.append(f"{section}:" if values else f"{section}: {{}}")
        lines += ["  " + _line(name, value, "") for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _as_given(name: str, value: Any) -> _Shown:
    if name in _SECRETS:
        return _Shown([], f"{len(value)} given, not shown" if value else "")
    if value == "auto":
        return _Shown(value, f"auto: {OPEN.get(name, 'chosen at the start')}")
    return _Shown(value, f"auto: {OPEN[name]}" if value in (None, []) and name in OPEN else "")


class _Case(NamedTuple):
    """A model and a device that the start may meet, and what would be chosen then."""

    model: ModelFacts
    device: DeviceFacts
    resolution: Resolution


def _chosen(engine: EngineConfig, model: ModelFacts | None) -> dict[str, _Shown]:
    """What `resolve` will choose, whichever of the possible models and devices it will meet."""
    cases = _possible_cases(engine, model)
    first, *others = [_by_name(case.resolution) for case in cases]
    chosen = {}
    for name, choice in first.items():
        same = [other[name] for other in others if name in other]
        if len(same) < len(others) or any(item.value != choice.value for item in same):
            continue
        is_sure = all(item.reason == choice.reason for item in same)
        reason = choice.reason if is_sure else OPEN.get(name, choice.reason)
        if _means_the_same(engine, choice, cases):
            chosen[name] = _Shown(choice.value, f"auto: {reason}")
        else:
            chosen[name] = _Shown(flatten(engine)[name], f"auto: {choice.value}, {reason}")
    return chosen


def _by_name(resolution: Resolution) -> dict[str, Choice]:
    return {choice.name: choice for choice in resolution.choices if choice.name != "device"}


def _means_the_same(engine: EngineConfig, choice: Choice, cases: list[_Case]) -> bool:
    """Nothing else would be chosen otherwise if the user had written this choice."""
    written = build(EngineConfig, {**flatten(engine), choice.name: choice.value})
    return all(
        resolve(written, case.model, case.device).config == case.resolution.config for case in cases
    )


def _possible_cases(engine: EngineConfig, model: ModelFacts | None) -> list[_Case]:
    """At least one. Raises ConfigError where no model and device would do."""
    asked = engine.compile.device
    cases, refusals = [], []
    for platform in _PLATFORMS if asked == "auto" else [asked]:
        device = DeviceFacts(
            platform=platform,
            device_kind="not looked at",
            num_devices=engine.parallel.tensor_parallel_size,
            memory_bytes=0,
        )
        for facts in _POSSIBLE_MODELS if model is None else [model]:
            try:
                cases.append(_Case(facts, device, resolve(engine, facts, device)))
            except ConfigError as error:
                refusals.append(error)
    if not cases:
        raise refusals[0]
    return cases


def _line(name: str, value: Any, comment: str) -> str:
    return f"{name}: {_flow(value)}" + (f"  # {comment}" if comment else "")


def _flow(value: Any) -> str:
    """YAML on one line, whatever `value` holds."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if not isinstance(value, str):
        return yaml.safe_dump(value).splitlines()[0]
    if _PLAIN.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    return yaml.safe_dump(value, default_style='"', width=_ENDLESS).rstrip("\n")
