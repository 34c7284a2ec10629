"""Every rule refuses what it should, and names setting, value and repair."""

from typing import Any

import pytest

from jaxinfer.config.fields import build, settings_of
from jaxinfer.config.schema import ServeConfig
from jaxinfer.config.validate import MISSING, RULES, validate
from jaxinfer.errors import ConfigError


def config_with(**values: Any) -> ServeConfig:
    return build(ServeConfig, values)


def test_rules_speak_of_settings_that_exist():
    names = settings_of(ServeConfig).keys()
    assert {rule.name for rule in RULES} <= names
    assert {missing.name for missing in MISSING} <= names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", float("nan")),
        ("block_size", 4),
        ("block_size", 24),
        ("block_size", 0),
        ("max_model_len", 0),
        ("max_num_seqs", -5),
        ("tensor_parallel_size", 0),
        ("long_prefill_token_threshold", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("token_buckets", [0, 16]),
        ("token_buckets", [16, 16]),
        ("token_buckets", [64, 16]),
        ("api_key", ["good", ""]),
        ("served_model_name", [""]),
        ("metrics_prefix", "my prefix"),
        ("metrics_prefix", "1x"),
        ("shutdown_timeout", -1.0),
        ("shutdown_timeout", float("inf")),
        ("root_path", "llm"),
        ("root_path", "/llm/"),
        ("host", ""),
        ("model", ""),
        ("generation_config", "no/such/directory"),
    ],
)
def test_a_value_out_of_range(name: str, value: Any):
    with pytest.raises(ConfigError) as error:
        validate(config_with(**{name: value}))
    assert str(error.value).startswith(f"{name} must be ")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 0),
        ("gpu_memory_utilization", 1.0),
        ("block_size", 8),
        ("block_size", 128),
        ("token_buckets", [16, 32]),
        ("root_path", "/llm"),
        ("metrics_prefix", "vllm"),
        ("generation_config", "vllm"),
        ("generation_config", "."),
    ],
)
def test_a_value_at_the_edge(name: str, value: Any):
    validate(config_with(**{name: value}))


def test_settings_that_contradict_each_other_are_both_named():
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=8 .*max_num_seqs=16"):
        validate(config_with(max_num_batched_tokens=8, max_num_seqs=16))
    with pytest.raises(ConfigError, match=r"token_buckets.*512.*max_num_batched_tokens=256"):
        validate(config_with(max_num_batched_tokens=256, token_buckets=[64, 512]))
