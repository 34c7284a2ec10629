"""What is chosen for each kind of device, and what contradicts model or device."""

from dataclasses import replace

import pytest

from jaxinfer.config.fields import flatten
from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.config.resolve import DeviceFacts, ModelFacts, describe, resolve
from jaxinfer.errors import ConfigError

MODEL = ModelFacts(max_position_embeddings=2048, dtype="bfloat16")
CPU = DeviceFacts(platform="cpu", device_kind="cpu", num_devices=1, memory_bytes=2**33)
GPU = DeviceFacts(platform="gpu", device_kind="NVIDIA H100", num_devices=2, memory_bytes=2**36)
TPU = DeviceFacts(platform="tpu", device_kind="TPU v6 lite", num_devices=8, memory_bytes=2**35)


def resolved(model: ModelFacts = MODEL, device: DeviceFacts = CPU, **kwargs: object) -> dict:
    return flatten(resolve(engine_config_from_kwargs(**kwargs), model, device).config)


@pytest.mark.parametrize(
    ("checkpoint", "device", "dtype"),
    [
        ("bfloat16", CPU, "float32"),
        ("float16", CPU, "float32"),
        ("bfloat16", GPU, "bfloat16"),
        ("float16", GPU, "float16"),
        ("float32", GPU, "bfloat16"),
        ("float16", TPU, "bfloat16"),
        ("float32", TPU, "bfloat16"),
        ("q4_1", GPU, "bfloat16"),
    ],
)
def test_dtype_follows_device_and_checkpoint(checkpoint: str, device: DeviceFacts, dtype: str):
    values = resolved(replace(MODEL, dtype=checkpoint), device)
    assert values["dtype"] == values["kv_cache_dtype"] == dtype


@pytest.mark.parametrize(
    ("asked", "checkpoint", "device", "weights"),
    [
        ({}, "bfloat16", CPU, "bfloat16"),  # half the bytes, and nothing lost
        ({}, "float32", CPU, "float32"),
        ({}, "float16", CPU, "float32"),
        ({"dtype": "float32"}, "bfloat16", CPU, "float32"),  # what was asked for, nothing less
        ({"dtype": "float32", "weight_dtype": "bfloat16"}, "float32", CPU, "bfloat16"),
        ({}, "bfloat16", TPU, "bfloat16"),
    ],
)
def test_weights_keep_the_checkpoints_type_where_products_allow_it(
    asked: dict[str, str], checkpoint: str, device: DeviceFacts, weights: str
):
    values = resolved(replace(MODEL, dtype=checkpoint), device, **asked)
    assert values["weight_dtype"] == weights


@pytest.mark.parametrize(
    ("asked", "device"),
    [
        ({"weight_dtype": "float32"}, TPU),
        ({"dtype": "float16", "weight_dtype": "bfloat16"}, CPU),
        ({"weight_dtype": "float16"}, CPU),
    ],
)
def test_types_that_no_product_mixes_are_refused(asked: dict[str, str], device: DeviceFacts):
    with pytest.raises(ConfigError, match="weight_dtype='.*' does not go with dtype="):
        resolved(MODEL, device, **asked)


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"),
    [("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16")],
)
def test_pages_whose_bits_a_cpu_cannot_tell_are_refused(dtype: str, kv_cache_dtype: str):
    with pytest.raises(ConfigError, match=f"kv_cache_dtype='{kv_cache_dtype}' does not go with"):
        resolved(dtype=dtype, kv_cache_dtype=kv_cache_dtype)


def test_a_given_dtype_stays_and_the_cache_follows_it():
    values = resolved(dtype="bfloat16")
    assert values["dtype"] == values["kv_cache_dtype"] == "bfloat16"
    values = resolved(dtype="bfloat16", kv_cache_dtype="float32")
    assert values["kv_cache_dtype"] == "float32"


@pytest.mark.parametrize(
    ("device", "seqs", "tokens"), [(CPU, 64, 512), (GPU, 256, 8192), (TPU, 256, 2048)]
)
def test_step_sizes_follow_the_device(device: DeviceFacts, seqs: int, tokens: int):
    values = resolved(device=device)
    assert (values["max_num_seqs"], values["max_num_batched_tokens"]) == (seqs, tokens)


def test_one_step_size_given_moves_the_other():
    assert resolved(max_num_seqs=1000)["max_num_batched_tokens"] == 1000
    assert resolved(max_num_batched_tokens=16)["max_num_seqs"] == 16
    assert resolved(token_buckets=[64, 1024])["max_num_batched_tokens"] == 1024


def test_nothing_is_left_open(empty_cache):
    values = resolved()
    for name in ("device", "dtype", "kv_cache_dtype", "max_model_len", "max_num_seqs"):
        assert values[name] not in ("auto", None)
    assert values["max_model_len"] == 2048
    assert values["num_compile_workers"] >= 1
    assert values["compile_cache"].startswith(str(empty_cache))
    assert resolved(compile_cache="none")["compile_cache"] == "none"


def test_the_page_size_is_what_was_asked_for_then_the_kernels_then_16():
    facts = replace(TPU, page_size={"bfloat16": 64, "fp8": 128}.__getitem__)
    assert resolved(device=TPU)["block_size"] == 16
    assert resolved(device=facts)["block_size"] == 64
    assert resolved(device=facts, kv_cache_dtype="fp8")["block_size"] == 128
    assert resolved(device=facts, block_size=32)["block_size"] == 32


def test_the_given_tree_is_not_changed_and_resolving_again_changes_nothing():
    config = engine_config_from_kwargs()
    first = resolve(config, MODEL, CPU)
    assert config == engine_config_from_kwargs()
    assert resolve(first.config, MODEL, CPU).config == first.config


def test_a_context_above_the_model_names_both():
    with pytest.raises(ConfigError, match=r"max_model_len=4096 .*max_position_embeddings=2048"):
        resolved(max_model_len=4096)
    assert resolved(max_model_len=100)["max_model_len"] == 100


def test_more_devices_than_there_are_names_both():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=4 .*there are 2 \(NVIDIA H100\)"):
        resolved(device=GPU, tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="xla_force_host_platform_device_count=4"):
        resolved(tensor_parallel_size=4)


def test_another_device_than_there_is():
    with pytest.raises(ConfigError, match=r"device='gpu'.*'cpu'"):
        resolve(engine_config_from_kwargs(device="gpu"), MODEL, CPU)
    with pytest.raises(ConfigError, match=r"device='cpu'.*JAX_PLATFORMS=cpu"):
        resolve(engine_config_from_kwargs(device="cpu"), MODEL, GPU)


def test_choices_say_why():
    resolution = resolve(engine_config_from_kwargs(), MODEL, CPU)
    table = describe(resolution.choices)
    for choice in resolution.choices:
        assert choice.reason
        assert choice.name in table
    assert "max_num_seqs" in table
    assert describe([]) == ""
