"""Every family and switch against Hugging Face transformers, on tests/golden.

The path is the engine's: reader, registry, family, loader, bound module, paged attention.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinfer.config.env import cache_dir
from jaxinfer.errors import CheckpointError
from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.matmul.cpu import StoredDType
from pallas_kernels.native.library import load_native_kernels
from tests.models.harness import (
    ENGINE_KERNELS,
    GOLDEN_DIR,
    GOLDEN_NAMES,
    REFERENCE_KERNELS,
    LoadedModel,
    Session,
    golden_of,
)
from tests.tolerances import LOGITS_BFLOAT16, LOGITS_FLOAT32, SWITCH

SPLITS = {
    "whole": [72],
    "whole-pages": [8, 16, 8, 40],
    "across-pages": [5, 1, 2, 9, 30, 25],
    "tokens-then-chunk": [1, 1, 1, 69],
}


ENGINE_NAMES = ["llama_9_3_tied", "mistral_window"]
"""Run with the engine's kernels as well: grouped heads, a window."""


def quick(names: set[str]) -> list[Any]:
    """All golden models; those that are not named are slow tests."""
    slow = pytest.mark.slow
    return [name if name in names else pytest.param(name, marks=slow) for name in GOLDEN_NAMES]


@cache
def loaded(name: str, kernels: KernelSet) -> LoadedModel:
    """On one device, in float32; its steps are compiled once."""
    return LoadedModel(GOLDEN_DIR / name, kernels=kernels)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_and_greedy_tokens(name: str):
    """The prompt whole, then its continuation by single tokens."""
    golden, session = golden_of(name), Session(loaded(name, REFERENCE_KERNELS))
    logits_TV = session.feed({0: golden.prompt})[0]
    assert golden.error(logits_TV) <= LOGITS_FLOAT32
    tokens = [int(logits_TV[-1].argmax())]
    while len(tokens) < len(golden.greedy):
        logits_TV = session.feed({0: [tokens[-1]]}, decode_only=False)[0]
        tokens.append(int(logits_TV[-1].argmax()))
    assert tokens == golden.greedy


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", quick(set(ENGINE_NAMES)))
def test_chunks_are_the_whole_prompt(name: str, split: str):
    golden, session = golden_of(name), Session(loaded(name, ENGINE_KERNELS))
    logits_TV = session.feed_in_chunks(golden.prompt, SPLITS[split])
    assert golden.error(logits_TV) <= LOGITS_FLOAT32


@pytest.mark.parametrize("name", ENGINE_NAMES)
def test_token_by_token_in_decode_steps(name: str):
    golden, session = golden_of(name), Session(loaded(name, ENGINE_KERNELS))
    logits_TV = session.feed_in_chunks(golden.prompt, [1] * len(golden.prompt))
    assert golden.error(logits_TV) <= LOGITS_FLOAT32


@pytest.mark.parametrize("name", ENGINE_NAMES)
def test_sequences_in_one_step_do_not_see_each_other(name: str):
    """Three copies of the prompt, at different places, in every mix of chunks and decodes."""
    golden, session = golden_of(name), Session(loaded(name, ENGINE_KERNELS))
    prompt = golden.prompt
    steps = [{0: 30, 1: 1}, {0: 1, 1: 1, 2: 40}, {1: 50, 2: 1}, {0: 41, 1: 1, 2: 1}, {1: 19, 2: 30}]
    found: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    for step in steps:
        places = session.num_cached
        chunks = {seq: prompt[places[seq] : places[seq] + size] for seq, size in step.items()}
        for seq, logits_TV in session.feed(chunks).items():
            found[seq].append(logits_TV)
    assert session.num_cached == [len(prompt)] * 3
    for parts in found.values():
        assert golden.error(np.concatenate(parts)) <= LOGITS_FLOAT32


@pytest.mark.parametrize("name", quick({"llama_9_3_tied", "llama_biases", "qwen3"}))
def test_logits_on_two_devices(name: str):
    """Among them: 3 KV heads, and a vocabulary that does not divide."""
    check_on_devices(name, tensor=2, kernels=REFERENCE_KERNELS)


@pytest.mark.parametrize("name", quick({"llama_9_3_tied", "llama_mqa", "granite"}))
def test_logits_on_four_devices(name: str):
    """Among them: 3 KV heads and one; a vocabulary and a hidden width that do not divide."""
    check_on_devices(name, tensor=4, kernels=REFERENCE_KERNELS)


def test_logits_on_several_devices_with_the_engines_kernels():
    check_on_devices("llama_9_3_tied", tensor=2, kernels=ENGINE_KERNELS)


def check_on_devices(name: str, *, tensor: int, kernels: KernelSet) -> None:
    golden, model = golden_of(name), LoadedModel(GOLDEN_DIR / name, tensor=tensor, kernels=kernels)
    logits_TV = Session(model).feed_in_chunks(golden.prompt, [40, 1, 31])
    assert golden.error(logits_TV) <= LOGITS_FLOAT32


@pytest.mark.parametrize("name", quick({"mistral_bfloat16", "qwen3", "granite"}))
def test_bfloat16_is_as_good_as_transformers(name: str):
    golden = golden_of(name)
    model = LoadedModel(GOLDEN_DIR / name, dtype="bfloat16", kernels=REFERENCE_KERNELS)
    logits_TV = Session(model).feed({0: golden.prompt})[0]
    assert golden.mean_error(logits_TV) <= LOGITS_BFLOAT16 * golden.bfloat16_error


def test_bfloat16_with_the_engines_kernels_and_pages():
    golden = golden_of("llama_9_3_tied")
    session = Session(LoadedModel(GOLDEN_DIR / "llama_9_3_tied", dtype="bfloat16"))
    logits_TV = session.feed_in_chunks(golden.prompt, [30, 1, 41])
    assert golden.mean_error(logits_TV) <= LOGITS_BFLOAT16 * golden.bfloat16_error


@pytest.mark.parametrize(
    ("name", "head_dim", "stored_weights"),
    [
        ("qwen3", 32, "float32"),
        ("mistral_window", 32, "float32"),
        ("mistral_bfloat16", 16, "bfloat16"),
    ],
)
def test_logits_with_the_cpp_kernels(name: str, head_dim: int, stored_weights: StoredDType):
    """A bfloat16 checkpoint loses nothing by bfloat16 storage: the bound is that of float32."""
    native = load_native_kernels(cache_dir() / "native", head_dim=head_dim, page_dtype="float32")
    if native.matmul is None:
        pytest.skip(native.matmul_reason)
    assert (native.paged_attention is not None) == (head_dim == 32), native.paged_attention_reason
    golden = golden_of(name)
    kernels = choose_kernels(platform="cpu", native=native, stored_weights=stored_weights)
    session = Session(LoadedModel(GOLDEN_DIR / name, kernels=kernels))
    logits_TV = session.feed_in_chunks(golden.prompt, [30, 1, 1, 40])
    assert golden.error(logits_TV) <= LOGITS_FLOAT32


def test_version_4_config_is_the_same_model(tmp_path: Path):
    """`rope_theta`, `rope_scaling` and `torch_dtype` in place of `rope_parameters` and `dtype`."""
    source = GOLDEN_DIR / "llama_rope_llama3"
    shutil.copy(source / "model.safetensors", tmp_path)
    shutil.copy(source / "config_version_4.json", tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" not in config and "dtype" not in config
    model, golden = LoadedModel(tmp_path, kernels=REFERENCE_KERNELS), golden_of(source.name)
    assert golden.error(Session(model).feed({0: golden.prompt})[0]) <= LOGITS_FLOAT32


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("llama_9_3_tied", {"rope_parameters": PLAIN_ROPE}),  # its theta is another
    ("llama_rope_llama3", {"rope_parameters": PLAIN_ROPE}),
    ("llama_rope_linear", {"rope_parameters": PLAIN_ROPE}),
    ("qwen2_rope_yarn", {"rope_parameters": PLAIN_ROPE}),
    ("mistral_window", {"sliding_window": 17}),  # one token more
    ("qwen2_mixed_windows", {"layer_types": None, "max_window_layers": 2}),
    ("qwen2_mixed_windows", {"use_sliding_window": False, "layer_types": None}),
    ("granite", {"embedding_multiplier": None}),
    ("granite", {"attention_multiplier": None}),
    ("granite", {"residual_multiplier": None}),
    ("granite", {"logits_scaling": None}),
    ("smollm3", {"no_rope_layers": [1, 1, 1]}),
]


@pytest.mark.parametrize(("name", "changes"), SWITCHES)
def test_switches_matter(name: str, changes: dict[str, Any]):
    """These models would tell if a switch were ignored: without it their logits are others."""
    golden = golden_of(name)
    model = LoadedModel(GOLDEN_DIR / name, kernels=REFERENCE_KERNELS, changes=changes)
    assert golden.error(Session(model).feed({0: golden.prompt})[0]) > SWITCH


@pytest.mark.parametrize(
    ("name", "changes", "tensor"),
    [
        ("llama_biases", {"attention_bias": False}, "model.layers.0.self_attn.q_proj.bias"),
        ("llama_biases", {"mlp_bias": False}, "model.layers.0.mlp.down_proj.bias"),
        ("llama_9_3_tied", {"tie_word_embeddings": False}, "lm_head.weight"),
        ("llama_mha", {"tie_word_embeddings": True, "vocab_size": 100}, "model.embed_tokens"),
        ("qwen2", {"model_type": "qwen3"}, "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3", {"model_type": "qwen2"}, "model.layers.0.self_attn.q_norm.weight"),
        ("qwen3", {"head_dim": None}, "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_switches_that_the_weights_contradict(name: str, changes: dict[str, Any], tensor: str):
    with pytest.raises(CheckpointError, match=tensor):
        LoadedModel(GOLDEN_DIR / name, changes=changes)
