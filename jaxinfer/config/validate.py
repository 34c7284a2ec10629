"""Which values of settings make sense, before any model or device is looked at.

Each rule is a row: a setting, a test, and what is expected. What depends on the model or on the
device is `config/resolve.py`'s.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.config.fields import flatten
from jaxinfer.errors import ConfigError

MAX_SEED = 2**32 - 1  # what every random generator that is seeded with it takes


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`name` must be `expected`; None always passes (it means: choose)."""

    name: str
    holds: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A setting of vLLM's whose only value in this version is `only`."""

    name: str
    only: Any
    why: str


def _is_page_size(value: int) -> bool:
    return value >= 8 and value & (value - 1) == 0


def _is_generation_config(value: str) -> bool:
    return value in ("auto", "vllm") or Path(value).is_dir()


def _is_ascending(values: list[int]) -> bool:
    return all(a < b for a, b in zip([0, *values], values, strict=False))


def _at_least(minimum: int, *names: str) -> list[Rule]:
    holds = lambda value: value >= minimum
    return [Rule(name=name, holds=holds, expected=f"at least {minimum}") for name in names]


RULES: tuple[Rule, ...] = (
    *_at_least(
        1,
        "max_model_len",
        "kv_cache_memory_bytes",
        "num_gpu_blocks_override",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_num_queued_reqs",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "num_compile_workers",
        "api_server_count",
        "max_body_bytes",
    ),
    *_at_least(0, "long_prefill_token_threshold", "engine_max_restarts"),
    Rule(name="model", holds=bool, expected="the name or the path of a model"),
    Rule(name="seed", holds=lambda v: 0 <= v <= MAX_SEED, expected=f"between 0 and {MAX_SEED}"),
    Rule(
        name="generation_config",
        holds=_is_generation_config,
        expected="auto, vllm or a directory that exists",
    ),
    Rule(name="block_size", holds=_is_page_size, expected="a power of two from 8 up"),
    Rule(
        name="gpu_memory_utilization",
        holds=lambda value: 0 < value <= 1,
        expected="above 0 and at most 1",
    ),
    Rule(name="compile_cache", holds=bool, expected="auto, none or a directory"),
    Rule(name="token_buckets", holds=_is_ascending, expected="positive and ascending"),
    Rule(name="host", holds=bool, expected="an address, like 127.0.0.1 or 0.0.0.0"),
    Rule(name="port", holds=lambda value: 0 <= value <= 65535, expected="between 0 and 65535"),
    Rule(name="api_key", holds=all, expected="keys that are not empty"),
    Rule(name="served_model_name", holds=all, expected="names that are not empty"),
    Rule(
        name="metrics_prefix",
        holds=lambda value: re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", value) is not None,
        expected="letters, digits and _, not starting with a digit",
    ),
    Rule(
        name="shutdown_timeout",
        holds=lambda value: value >= 0 and math.isfinite(value),
        expected="seconds, at least 0",
    ),
    Rule(
        name="engine_stall_timeout",
        holds=lambda value: value >= 0 and math.isfinite(value),
        expected="seconds, at least 0 (0: never)",
    ),
    Rule(
        name="root_path",
        holds=lambda value: value == "" or re.fullmatch(r"/.*[^/]", value) is not None,
        expected="empty, or a path like /llm (a slash first, none at the end)",
    ),
    Rule(name="response_role", holds=bool, expected="a role, like assistant"),
)

MISSING: tuple[Missing, ...] = (
    Missing(name="quantization", only=None, why="weights are served in --dtype"),
    Missing(name="speculative_config", only={}, why="there is no speculative decoding"),
    Missing(name="enable_expert_parallel", only=False, why="there are no expert models"),
    Missing(name="pipeline_parallel_size", only=1, why="use --tensor-parallel-size"),
    Missing(name="data_parallel_size", only=1, why="start several servers"),
    Missing(name="api_server_count", only=1, why="one HTTP process serves"),
    Missing(name="tool_call_parser", only=None, why="tool calls are not read from the output"),
    Missing(name="reasoning_parser", only=None, why="reasoning is not read from the output"),
)


def _check_missing(values: dict[str, Any]) -> None:
    if values["trust_remote_code"]:
        raise ConfigError(
            "trust_remote_code=True is refused: jaxinfer runs no code from checkpoints. "
            "Leave the flag out; the architecture must be one that jaxinfer has itself."
        )
    for missing in MISSING:
        if missing.name in values and values[missing.name] != missing.only:
            raise ConfigError(
                f"{missing.name}={values[missing.name]!r} is not supported yet in this version "
                f"({missing.why}). Leave it out."
            )


def _check_combinations(values: dict[str, Any]) -> None:
    tokens, seqs = values["max_num_batched_tokens"], values["max_num_seqs"]
    if tokens is not None and seqs is not None and tokens < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} is below max_num_seqs={seqs}: every running sequence "
            "needs a token in each step. Raise the first or lower the second."
        )
    if values["attention_backend"] == "native" and not values["native_kernels"]:
        raise ConfigError(
            "attention_backend='native' contradicts native_kernels=False, which leaves out C++. "
            "Drop one of the two."
        )
    buckets = values["token_buckets"]
    if buckets and tokens is not None and buckets[-1] > tokens:
        raise ConfigError(
            f"token_buckets holds {buckets[-1]}, which is above max_num_batched_tokens={tokens}: "
            "no step is that large. Leave it out or raise max_num_batched_tokens."
        )


def validate(config: Any) -> None:
    """Raises ConfigError that names setting, value and repair; returns when all is well.

    `config` is an EngineConfig or a tree that holds one.
    """
    values = flatten(config)
    for rule in RULES:
        value = values.get(rule.name)
        if value is not None and not rule.holds(value):
            raise ConfigError(f"{rule.name} must be {rule.expected}, got {value!r}.")
    _check_missing(values)
    _check_combinations(values)
