"""Chooses every setting that was left to be chosen, from the model and the device.

Pure: facts in, a new tree and the list of choices out. Knows no JAX; who calls it has looked at
the checkpoint and the devices already.

After it no setting says "auto" or None where a number, a type or a path is meant. What stays None
is an override that was not given (`num_gpu_blocks_override`, `revision`, `tokenizer`, ...); what
stays "auto" is a mode: `load_format` (the checkpoint reader tells formats apart),
`generation_config` ("the model's") and `attention_backend` (a GPU's is tried before it is chosen).
`token_buckets` may stay empty: the runner makes them from the sizes chosen here.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxinfer.config.env import cache_dir
from jaxinfer.config.fields import build, flatten
from jaxinfer.config.schema import EngineConfig
from jaxinfer.config.validate import validate
from jaxinfer.errors import ConfigError

_MAX_NUM_SEQS = {"cpu": 64}
_MAX_NUM_SEQS_ELSEWHERE = 256
_PAGE_SIZE = 16
_MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "tpu": 2048, "gpu": 8192}
ATTENTION_BACKENDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": ("native", "xla"),
        "gpu": ("mosaic_gpu", "triton", "xla"),
        "tpu": ("pallas_tpu", "xla"),
    }
)
"""By platform, from the one wanted most."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a checkpoint says that settings depend on."""

    max_position_embeddings: int
    dtype: str  # of the checkpoint's matrices: float32, bfloat16, float16 or a quantized format


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """The devices that are there."""

    platform: str  # cpu, gpu or tpu
    device_kind: str
    num_devices: int
    memory_bytes: int  # of one device
    # Of a --kv-cache-dtype: the tokens of a page that its kernels read best. None: no matter.
    page_size: Callable[[str], int] | None = None


class Choice(NamedTuple):
    """One setting that was chosen, or taken from the model, and why."""

    name: str
    value: Any
    reason: str


class Resolution(NamedTuple):
    """A configuration with nothing left open, and how it came about."""

    config: EngineConfig
    choices: tuple[Choice, ...]


def _device(values: dict[str, Any], device: DeviceFacts) -> Iterable[Choice]:
    asked = values["device"]
    if asked not in ("auto", device.platform):
        repair = (
            "Set JAX_PLATFORMS=cpu before the start"
            if asked == "cpu"
            else f"Install jaxinfer[{asked}] on a machine that has one"
        )
        raise ConfigError(
            f"device={asked!r} was asked for, but JAX runs on {device.platform!r} "
            f"({device.device_kind}). {repair}, or leave the flag out."
        )
    yield Choice("device", device.platform, f"what JAX found: {device.device_kind}")
    asked_devices = values["tensor_parallel_size"]
    if asked_devices > device.num_devices:
        hint = (
            f" For virtual CPU devices set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{asked_devices} before the start."
            if device.platform == "cpu"
            else ""
        )
        raise ConfigError(
            f"tensor_parallel_size={asked_devices} needs {asked_devices} devices, but there "
            f"are {device.num_devices} ({device.device_kind}). Lower it.{hint}"
        )


def _check_attention_backend(values: dict[str, Any], device: DeviceFacts) -> None:
    asked, there = values["attention_backend"], ATTENTION_BACKENDS[device.platform]
    if asked not in ("auto", *there):
        raise ConfigError(
            f"attention_backend={asked!r} is not for {device.platform!r} ({device.device_kind}), "
            f"which has {' and '.join(there)}. Name one of those, or leave the flag out."
        )


_UNREADABLE_PAGES = {("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16")}
"""A CPU's pages hold 16-bit values as bits: those of the dtype, or bfloat16 of float32."""


def _dtypes(values: dict[str, Any], model: ModelFacts, device: DeviceFacts) -> Iterable[Choice]:
    dtype = values["dtype"]
    if dtype == "auto":
        if device.platform == "cpu":
            dtype, reason = "float32", "what a CPU computes in"
        elif model.dtype in ("float16", "bfloat16") and device.platform == "gpu":
            dtype, reason = model.dtype, "the checkpoint's"
        else:
            dtype, reason = "bfloat16", f"the checkpoint's is {model.dtype}"
        yield Choice("dtype", dtype, reason)
    yield from _weight_dtype(values, dtype, model, device)
    kv_cache_dtype = values["kv_cache_dtype"]
    if kv_cache_dtype == "auto":
        kv_cache_dtype = dtype
        yield Choice("kv_cache_dtype", dtype, "the dtype")
    elif device.platform == "cpu" and (dtype, kv_cache_dtype) in _UNREADABLE_PAGES:
        raise ConfigError(
            f"kv_cache_dtype={kv_cache_dtype!r} does not go with dtype={dtype!r} on a CPU. Leave "
            "kv_cache_dtype out, or give bfloat16 (with dtype float32), int8 or fp8."
        )
    if values["block_size"] is None:
        if device.page_size is None:
            yield Choice("block_size", _PAGE_SIZE, f"usual on {device.platform}")
        else:
            size = device.page_size(kv_cache_dtype)
            yield Choice("block_size", size, f"a page is read as fast as {device.device_kind} can")


def _weight_dtype(
    values: dict[str, Any], dtype: str, model: ModelFacts, device: DeviceFacts
) -> Iterable[Choice]:
    """`dtype` is what was chosen, `values` what was asked for."""
    asked = values["weight_dtype"]
    if asked == "auto":
        if device.platform == "cpu" and values["dtype"] == "auto" and model.dtype == "bfloat16":
            yield Choice("weight_dtype", "bfloat16", "the checkpoint's; products are float32")
        else:
            yield Choice("weight_dtype", dtype, "the dtype")
    elif asked != dtype and (device.platform != "cpu" or "float16" in (asked, dtype)):
        raise ConfigError(
            f"weight_dtype={asked!r} does not go with dtype={dtype!r} on {device.platform!r}: only "
            "a CPU mixes types, and only float32 with bfloat16. Leave weight_dtype out."
        )


def _context(values: dict[str, Any], model: ModelFacts) -> Iterable[Choice]:
    longest, asked = model.max_position_embeddings, values["max_model_len"]
    if asked is None:
        yield Choice("max_model_len", longest, "the model's max_position_embeddings")
    elif asked > longest:
        raise ConfigError(
            f"max_model_len={asked} is above the model's max_position_embeddings={longest}. "
            f"Give at most {longest}."
        )


def _step_size(values: dict[str, Any], device: DeviceFacts) -> Iterable[Choice]:
    seqs, tokens = values["max_num_seqs"], values["max_num_batched_tokens"]
    if seqs is None:
        seqs = _MAX_NUM_SEQS.get(device.platform, _MAX_NUM_SEQS_ELSEWHERE)
        reason = f"usual on {device.platform}"
        if tokens is not None and tokens < seqs:
            seqs, reason = tokens, "max_num_batched_tokens allows no more"
        yield Choice("max_num_seqs", seqs, reason)
    if tokens is None:
        usual = _MAX_NUM_BATCHED_TOKENS[device.platform]
        reason = f"usual on {device.platform}" if usual >= seqs else "one for each sequence"
        tokens = max(usual, seqs)
        largest_bucket = max(values["token_buckets"], default=0)
        if largest_bucket > tokens:
            tokens, reason = largest_bucket, "the largest of token_buckets"
        yield Choice("max_num_batched_tokens", tokens, reason)


def _host(values: dict[str, Any]) -> Iterable[Choice]:
    if values["num_compile_workers"] is None:
        workers = os.cpu_count() or 1
        yield Choice("num_compile_workers", workers, "the CPU cores of this machine")
    if values["compile_cache"] == "auto":
        yield Choice("compile_cache", str(cache_dir() / "compiled"), "the cache directory")


def resolve(config: EngineConfig, model: ModelFacts, device: DeviceFacts) -> Resolution:
    """A new tree in which everything is chosen, and the choices with their reasons.

    Raises ConfigError, naming both sides, when a setting contradicts the model or the device.
    """
    assert device.platform in _MAX_NUM_BATCHED_TOKENS, device.platform
    values = flatten(config)
    _check_attention_backend(values, device)
    choices = (
        *_device(values, device),
        *_dtypes(values, model, device),
        *_context(values, model),
        *_step_size(values, device),
        *_host(values),
    )
    resolved = build(EngineConfig, values | {choice.name: choice.value for choice in choices})
    validate(resolved)
    return Resolution(resolved, choices)


def describe(choices: Iterable[Choice]) -> str:
    """The choices as a small table, for the log."""
    rows = [(choice.name, str(choice.value), choice.reason) for choice in choices]
    name_width = max((len(name) for name, _, _ in rows), default=0)
    value_width = max((len(value) for _, value, _ in rows), default=0)
    return "\n".join(
        f"  {name:<{name_width}}  {value:<{value_width}}  {reason}" for name, value, reason in rows
    )
