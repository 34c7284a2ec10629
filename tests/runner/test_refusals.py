"""Checkpoints and settings that cannot be served are refused before anything is compiled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.errors import CapacityError, CheckpointError, ConfigError, JaxInferError
from jaxinfer.runner.build import build_runner
from tests.e2e.tiny_model import write_tiny_model
from tests.weights.checkpoints import write_gguf

Change = Callable[[Path], None]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def refused(model: Path, kind: type[JaxInferError], **settings: Any) -> str:
    """The message; fails when anything was compiled or loaded before it came."""

    def on_progress(phase: str, done: int, total: int) -> None:
        raise AssertionError(f"{phase} was begun")

    config = engine_config_from_kwargs(model=str(model), **settings)
    with pytest.raises(kind) as caught:
        build_runner(config, on_progress)
    assert type(caught.value) is kind
    return str(caught.value)


def config_with(**changes: Any) -> Change:
    """A value of None takes the key away."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def weights_with(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return apply


def cut(num_bytes: int) -> Change:
    def apply(directory: Path) -> None:
        content = (directory / WEIGHTS).read_bytes()
        (directory / WEIGHTS).write_bytes(content[:num_bytes])

    return apply


def shard(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def shard_and_lose_one(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def break_layer(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["model.layers.0.adapter.weight"] = np.ones(3, np.float32)


QUANTIZED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
BAD_CHECKPOINTS: list[tuple[Change, list[str]]] = [
    (lambda d: (d / "config.json").unlink(), ["config.json is missing"]),
    (shard_and_lose_one, ["lacks 1 of 2 shards", "model-00002-of-00002.safetensors"]),
    (cut(40), ["model.safetensors", "40 bytes", "ends inside its header"]),
    (cut(100_000), ["model.safetensors is cut short", "100000 bytes"]),
    (cut(0), ["0 bytes", "download it again"]),
    (
        weights_with(break_layer),
        ["3 problems", "missing: tensor model.layers.1.mlp.up_proj", "wrong shape", "left over"],
    ),
    (
        config_with(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        ["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"],
    ),
    (config_with(architectures=None), ["architectures []", "LlamaForCausalLM"]),
    (config_with(quantization_config=QUANTIZED), ["quantized (compressed-tensors)", "GGUF"]),
    (config_with(attn_logit_softcapping=50.0), ["attn_logit_softcapping=50.0"]),
    (config_with(hidden_size=None), ["no 'hidden_size'"]),
    (config_with(hidden_size="big"), ["hidden_size", "positive integer", "'big'"]),
    (config_with(num_hidden_layers=-1), ["num_hidden_layers", "positive integer", "-1"]),
    (config_with(num_attention_heads=True), ["num_attention_heads", "True"]),
    (config_with(rms_norm_eps="tiny"), ["rms_norm_eps", "a number", "'tiny'"]),
    (config_with(num_hidden_layers=3), ["missing: tensor model.layers.2"]),
]


@pytest.mark.parametrize(("change", "words"), BAD_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_served(
    change: Change, words: list[str], model: Path, tmp_path: Path
):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    change(directory)
    message = refused(directory, CheckpointError)
    for word in words:
        assert word in message, message


def test_gguf_files_cut_short_or_of_another_architecture(tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.ones((16, 32), np.float32)})
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    message = refused(file, CheckpointError)
    assert f"it has {len(content) - 1} bytes" in message and "cut short" in message
    other = write_gguf(tmp_path / "o.gguf", {}, arch="gpt2")
    message = refused(other, CheckpointError)
    assert "'gpt2'" in message and "llama" in message and "qwen3" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 100_000}, ["max_model_len=100000", "Give at most 512"]),
        ({"tensor_parallel_size": 16}, ["tensor_parallel_size=16", "there are 8", "Lower it"]),
        ({"device": "tpu"}, ["device='tpu'", "'cpu'", "jaxinfer[tpu]"]),
        ({"compile_cache": "/proc/nothing"}, ["--compile-cache=/proc/nothing", "none"]),
    ],
)
def test_settings_that_contradict_model_or_machine(
    settings: dict[str, Any], words: list[str], model: Path
):
    message = refused(model, ConfigError, **settings)
    for word in words:
        assert word in message, message


def test_a_format_that_is_not_there(model: Path):
    message = refused(model, CheckpointError, load_format="gguf")
    assert "load_format is 'gguf'" in message and "--load-format safetensors" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_cache_memory_bytes": 1000}, ["512 needs 32 KV pages", "--kv-cache-memory-bytes 26"]),
        ({"kv_cache_memory_bytes": 100_000}, ["--max-model-len 192 would fit"]),
        ({"num_gpu_blocks_override": 10**9}, ["1000000000 were planned", "pages fit"]),
        ({"gpu_memory_utilization": 1e-6}, ["weights", "--gpu-memory-utilization", "--dtype"]),
        ({"max_num_batched_tokens": 10**9}, ["--max-num-batched-tokens"]),
    ],
)
def test_too_little_memory_says_what_would_fit(
    settings: dict[str, Any], words: list[str], model: Path
):
    message = refused(model, CapacityError, **settings)
    for word in words:
        assert word in message, message
