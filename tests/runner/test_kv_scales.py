"""--kv-cache-dtype of 8 bits: where its scales come from, and an engine with such pages."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.errors import CheckpointError
from jaxinfer.models.registry import define_model
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.runner.abstract import AbstractModel, make_abstract
from jaxinfer.runner.kv_scales import HEADROOM, make_kv_scales
from jaxinfer.weights.loader import check_fit, load_params
from jaxinfer.weights.reader import CheckpointReader, open_checkpoint
from pallas_kernels.dispatch import choose_kernels
from tests.runner.conftest import MakeRunner
from tests.runner.harness import Engine
from tests.runner.tiny_llama import NORM_EPS, ROPE_THETA, TinyLlama

LAYER_0 = "model.layers.0.self_attn"
NEAR = 0.35  # of a log-probability, with 8 bits a value


@pytest.mark.parametrize("name", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_an_engine_with_8_bit_pages_is_nearly_the_model(
    make_runner: MakeRunner, tmp_path: Path, name: str
):
    """Values are much smaller than keys, so that one scale for the other would be noticed."""
    tiny = TinyLlama()
    for layer in range(tiny.num_layers):
        tiny.weights[f"model.layers.{layer}.self_attn.v_proj.weight"] /= 64
        tiny.weights[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 64
    small = make_runner(tiny.save(tmp_path), kv_cache_dtype=name, max_num_seqs=1)
    assert small.memory.page_bytes == 2 * 8 * 2 * 2 * 8  # layers, tokens, heads, K and V, bytes
    prompt = np.random.default_rng(1).integers(2, 96, 50).tolist()  # two chunks
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0)
    found = Engine(small).run(prompt, sampling)
    tokens = prompt + found.token_ids
    expected = tiny.log_probs(tokens)[len(prompt) - 1 : -1]
    for row, token, entry in zip(expected, found.token_ids, found.logprobs, strict=True):
        assert abs(entry.logprobs[0] - row[token]) < NEAR
    assert small.num_compiles_after_ready == 0


def model_of(reader: CheckpointReader, *, tensor: int = 1) -> tuple[EngineConfig, AbstractModel]:
    """An int8 engine's model, on virtual devices."""
    config = engine_config_from_kwargs(
        kv_cache_dtype="int8", dtype="float32", max_model_len=96, num_compile_workers=1
    )
    definition = define_model(reader.config(), tensor=tensor)
    mesh = make_mesh(tensor=tensor, devices=jax.devices())
    kernels = choose_kernels(platform="cpu")
    model = make_abstract(definition, mesh, kernels, dtype="float32", kv_cache_dtype="int8")
    return replace(config, compile=replace(config.compile, device="cpu")), model


def scales_of(directory: Path, *, tensor: int = 1) -> dict[str, np.ndarray]:
    reader = open_checkpoint(directory)
    config, model = model_of(reader, tensor=tensor)
    weights = load_params(
        reader,
        model.checkpoint_params,
        model.definition.pieces,
        optional_names=model.definition.is_optional,
        packings=model.packings,
        on_progress=lambda *_: None,
    )
    found = make_kv_scales(config, model, reader, weights, None)
    for path, array in found.items():
        assert array.sharding == model.params[path].sharding
    return {path: np.asarray(array) for path, array in found.items()}


def keys_and_values(tiny: TinyLlama, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the first layer, before rotation, float64 [T, K, H]."""
    x_TD = tiny.weights["model.embed_tokens.weight"][tokens].astype(np.float64)
    scale_D = tiny.weights["model.layers.0.input_layernorm.weight"]
    x_TD = x_TD / np.sqrt((x_TD**2).mean(axis=-1, keepdims=True) + NORM_EPS) * scale_D
    shape = (len(tokens), tiny.num_kv_heads, tiny.head_dim)
    return tuple((x_TD @ tiny.weights[f"{LAYER_0}.{p}_proj.weight"].T).reshape(shape) for p in "kv")


@pytest.mark.parametrize("tensor", [1, 2])
def test_measured_scales_are_those_of_the_largest_key_and_value(
    tiny: TinyLlama, tiny_dir: Path, tensor: int
):
    scales = scales_of(tiny_dir, tensor=tensor)
    assert len(scales) == 2 * tiny.num_layers
    tokens = np.random.default_rng(0).integers(0, tiny.vocab_size, 96)  # the seed of --seed 0
    k_TKH, v_TKH = keys_and_values(tiny, tokens)
    to_scale = HEADROOM["int8"] / 127
    largest_K = np.abs(v_TKH).max(axis=(0, 2))
    np.testing.assert_allclose(
        scales["layers.0.attention.v_scale"], largest_K * to_scale, rtol=1e-5
    )
    angle_TF = np.arange(96)[:, None] * ROPE_THETA ** (-np.arange(4) / 4)
    cos, sin = np.cos(angle_TF)[:, None], np.sin(angle_TF)[:, None]
    first, second = k_TKH[..., :4], k_TKH[..., 4:]
    rotated = np.maximum(np.abs(first * cos - second * sin), np.abs(second * cos + first * sin))
    largest_K = rotated.max(axis=(0, 2))
    np.testing.assert_allclose(
        scales["layers.0.attention.k_scale"], largest_K * to_scale, rtol=1e-5
    )


def save_with(directory: Path, **scales: np.ndarray) -> Path:
    """A checkpoint with these scales in every layer."""
    model = TinyLlama()
    for layer in range(model.num_layers):
        for name, value in scales.items():
            model.weights[f"model.layers.{layer}.self_attn.{name}"] = np.asarray(value, np.float32)
    return model.save(directory)


def test_the_checkpoints_scales_are_taken(tmp_path: Path):
    """One for all heads, one a head; and nothing is measured when none is missing."""
    path = save_with(tmp_path, k_scale=np.float32(0.25), v_scale=np.array([[0.5], [0.125]]))
    scales = scales_of(path)
    np.testing.assert_array_equal(scales["layers.1.attention.k_scale"], [0.25, 0.25])
    np.testing.assert_array_equal(scales["layers.1.attention.v_scale"], [0.5, 0.125])


@pytest.mark.parametrize(
    "value", [np.zeros(1), np.array([np.nan]), np.array([-1.0]), np.ones(3), np.ones(0)]
)
def test_scales_that_cannot_be_are_refused_by_name(tmp_path: Path, value: np.ndarray):
    path = save_with(tmp_path, k_scale=value, v_scale=np.ones(1))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_scale must hold") as error:
        scales_of(path)
    assert "--kv-cache-dtype" in str(error.value)


def test_a_model_without_8_bit_pages_leaves_them(tmp_path: Path):
    reader = open_checkpoint(save_with(tmp_path, k_scale=np.ones(1), v_scale=np.ones(1)))
    _, quantized = model_of(reader)
    model = make_abstract(quantized.definition, quantized.mesh, quantized.kernels, dtype="float32")
    assert len(quantized.kv_scales) == 4 and not model.kv_scales
    assert model.params.keys() == quantized.checkpoint_params.keys()
    definition = model.definition
    check_fit(reader, model.params, definition.pieces, optional_names=definition.is_optional)
