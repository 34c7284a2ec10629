"""The config.json made from GGUF metadata, family by family, against transformers' formulas."""

import numpy as np
import pytest

from jaxinfer.errors import CheckpointError
from jaxinfer.weights.gguf_config import llama3_factors
from jaxinfer.weights.reader import open_checkpoint
from tests.weights.checkpoints import write_gguf

BLOCK = {"token_embd.weight": np.zeros((16, 32), np.float32)}


def config_of(path, *, tensors=None, **arguments):
    write_gguf(path / "m.gguf", BLOCK | (tensors or {}), **arguments)
    return open_checkpoint(path / "m.gguf").config()


def test_sizes_heads_and_dtype(tmp_path):
    config = config_of(tmp_path)
    assert config["hidden_size"] == 32 and config["head_dim"] == 8
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert config["vocab_size"] == 16 and config["tie_word_embeddings"]
    assert config["dtype"] == "float32"
    assert not config["attention_bias"] and not config["mlp_bias"]
    half = {"output.weight": np.zeros((16, 32), np.float16)}
    config = config_of(tmp_path, tensors=half, metadata={"attention.key_length": 16})
    assert config["head_dim"] == 16 and not config["tie_word_embeddings"]
    assert config["dtype"] == "bfloat16"


def test_missing_kv_heads_are_as_many_as_heads_and_equal_arrays_are_one_number(tmp_path):
    config = config_of(tmp_path, metadata={"attention.head_count_kv": None})
    assert config["num_key_value_heads"] == 4
    config = config_of(tmp_path, metadata={"attention.head_count_kv": [2, 2]})
    assert config["num_key_value_heads"] == 2
    with pytest.raises(CheckpointError, match="head_count_kv differs between layers"):
        config_of(tmp_path, metadata={"attention.head_count_kv": [2, 4]})


@pytest.mark.parametrize(
    ("arch", "hf_class"), [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")]
)
def test_qwen(tmp_path, arch, hf_class):
    config = config_of(tmp_path, arch=arch)
    assert config["architectures"] == [hf_class] and config["model_type"] == arch


def test_mistral_is_a_llama_with_a_window(tmp_path):
    config = config_of(tmp_path, metadata={"attention.sliding_window": 128})
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] == 128


def test_granite_multipliers(tmp_path):
    metadata = {
        "attention.scale": 0.0078125,
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "logit_scale": 16.0,
    }
    config = config_of(tmp_path, arch="granite", metadata=metadata)
    assert config["attention_multiplier"] == 0.0078125
    assert config["embedding_multiplier"] == 12.0
    assert config["residual_multiplier"] == 0.22
    assert config["logits_scaling"] == 16.0
    assert config_of(tmp_path, arch="granite")["attention_multiplier"] == pytest.approx(8**-0.5)


def test_smollm3_layers_without_rope(tmp_path):
    config = config_of(tmp_path, arch="smollm3", metadata={"block_count": 9})
    assert config["no_rope_layers"] == [1, 1, 1, 0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_become_the_parameters_they_were_made_from(tmp_path, factor):
    made_from = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    stored = literal_llama3_factors(made_from, head_dim=64).astype(np.float32)
    metadata = {"rope.freq_base": 500000.0, "attention.key_length": 64}
    tensors = {"rope_freqs.weight": stored}
    assert config_of(tmp_path, tensors=tensors, metadata=metadata)["rope_parameters"] == made_from
    reader = open_checkpoint(tmp_path / "m.gguf")
    assert list(reader.tensors()) == ["model.embed_tokens.weight"]  # the factors are not a weight
    with pytest.raises(CheckpointError, match="not those of llama3"):
        config_of(tmp_path, tensors={"rope_freqs.weight": stored * 1.1}, metadata=metadata)


def literal_llama3_factors(parameters: dict, *, head_dim: int) -> np.ndarray:
    """Case by case, as the Llama 3.1 model card has it."""
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * parameters["rope_theta"] ** (i / head_dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out)


@pytest.mark.slow  # imports torch
def test_llama3_factors_are_those_of_transformers():
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    theirs = 500000.0 ** -(np.arange(0, 128, 2) / 128) / frequencies.numpy()
    np.testing.assert_allclose(literal_llama3_factors(parameters, head_dim=128), theirs, rtol=1e-5)
    ours = llama3_factors(
        rope_theta=500000.0, num_factors=64, factor=8.0, low=1.0, high=4.0, original=8192
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_factors_stay_between_one_and_the_stretch():
    factors = llama3_factors(
        rope_theta=500000.0, num_factors=64, factor=8.0, low=1.0, high=4.0, original=8192
    )
    assert factors[0] == 1.0 and factors[-1] == 8.0
    assert (np.diff(factors) >= 0).all()


def test_other_rope_scaling(tmp_path):
    metadata = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32768,
    }
    assert config_of(tmp_path, arch="qwen2", metadata=metadata)["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    partial = config_of(tmp_path, metadata={"rope.dimension_count": 4})["rope_parameters"]
    assert partial["partial_rotary_factor"] == 0.5


def test_generation_config_ends_at_both_kinds_of_end(tmp_path):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 3, "padding_token_id": 0}
    plain = {f"tokenizer.ggml.{key}": value for key, value in tokens.items()}
    path = write_gguf(tmp_path / "m.gguf", BLOCK, plain=plain)
    expected = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    assert open_checkpoint(path).generation_config() == expected
    plain["tokenizer.ggml.eot_token_id"] = 2
    path = write_gguf(tmp_path / "m.gguf", BLOCK, plain=plain)
    assert open_checkpoint(path).generation_config()["eos_token_id"] == 2
