"""config.json: what published models say is read right, and what nobody here knows is refused.

configs/ holds the contents of published config.json files.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxinfer.errors import CheckpointError
from jaxinfer.models.llama_config import LlamaConfig, config_from_hf
from jaxinfer.models.registry import FAMILIES, define_model
from jaxinfer.weights.reader import read_json_object

CONFIGS_DIR = Path(__file__).parent / "configs"


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS_DIR / f"{name}.json").read_text())


def parse(config: dict[str, Any]) -> LlamaConfig:
    return config_from_hf(config, tensor=1)


class Expected(NamedTuple):
    """(layers, width, hidden width, heads, KV heads, head size), theta and what is switched on."""

    sizes: tuple[int, int, int, int, int, int]
    theta: float
    tied: bool = False
    window: int | None = None
    on: frozenset[str] = frozenset()


EXPECTED = {
    "llama-2-7b": Expected((32, 4096, 11008, 32, 32, 128), 1e4),
    "llama-3.1-8b": Expected((32, 4096, 14336, 32, 8, 128), 5e5),
    "llama-3.2-1b": Expected((16, 2048, 8192, 32, 8, 64), 5e5, tied=True),
    "tinyllama-1.1b": Expected((22, 2048, 5632, 32, 4, 64), 1e4),
    "smollm2-135m-instruct": Expected((30, 576, 1536, 9, 3, 64), 1e5, tied=True),
    "smollm3-3b": Expected((36, 2048, 11008, 16, 4, 128), 5e6, tied=True),
    "mistral-7b-v0.1": Expected((32, 4096, 14336, 32, 8, 128), 1e4, window=4096),
    "mistral-7b-v0.3": Expected((32, 4096, 14336, 32, 8, 128), 1e6),
    "mistral-nemo-12b": Expected((40, 5120, 14336, 32, 8, 128), 1e6),
    "ministral-8b-2410": Expected((36, 4096, 12288, 32, 8, 128), 1e8, window=32768),
    "qwen2.5-0.5b": Expected(
        (24, 896, 4864, 14, 2, 64), 1e6, tied=True, on=frozenset({"qkv_bias"})
    ),
    "qwen2.5-7b-instruct": Expected((28, 3584, 18944, 28, 4, 128), 1e6, on=frozenset({"qkv_bias"})),
    "qwen3-0.6b": Expected((28, 1024, 3072, 16, 8, 128), 1e6, tied=True, on=frozenset({"qk_norm"})),
    "qwen3-8b": Expected((36, 4096, 12288, 32, 8, 128), 1e6, on=frozenset({"qk_norm"})),
    "granite-3.3-8b-instruct": Expected((40, 4096, 12800, 32, 8, 128), 1e7, tied=True),
}
SCALED = {"llama-3.1-8b": 8.0, "llama-3.2-1b": 32.0}


def test_every_published_config_is_expected():
    assert sorted(path.stem for path in CONFIGS_DIR.iterdir()) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_published_models(name: str):
    config, (sizes, theta, tied, window, on) = published(name), EXPECTED[name]
    shape, parsed = define_model(config, tensor=1).shape, parse(config)
    assert sizes == (
        parsed.num_layers,
        parsed.model_dim,
        parsed.hidden_dim,
        parsed.num_heads,
        parsed.num_kv_heads,
        parsed.head_dim,
    )
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim) == (sizes[0], *sizes[4:])
    assert shape.vocab_size == parsed.vocab_size == config["vocab_size"]
    assert shape.max_position_embeddings == config["max_position_embeddings"]
    assert shape.checkpoint_dtype == config["torch_dtype"]
    assert parsed.norm_eps == config["rms_norm_eps"]
    assert parsed.tie_embeddings == tied
    assert parsed.windows == (window,) * sizes[0]
    switches = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm")
    assert {switch for switch in switches if getattr(parsed, switch)} == on
    # The second frequency gives theta away, the last one is what scaling slows.
    half = sizes[5] // 2
    assert parsed.rope.inv_freq[1] == pytest.approx(theta ** (-1 / half))
    slowest = theta ** (-(half - 1) / half) / SCALED.get(name, 1.0)
    assert parsed.rope.inv_freq[-1] == pytest.approx(slowest)


def test_granites_multipliers():
    granite = parse(published("granite-3.3-8b-instruct"))
    assert granite.attention_scale == 0.0078125
    assert granite.embedding_multiplier == 12.0
    assert granite.residual_multiplier == 0.22
    assert granite.logits_divisor == 16.0
    llama = parse(published("llama-3.1-8b"))
    assert llama.attention_scale == pytest.approx(128**-0.5)
    assert llama.embedding_multiplier == llama.residual_multiplier == llama.logits_divisor == 1.0


def test_smollm3_leaves_every_fourth_layer_without_rope():
    config = published("smollm3-3b")
    expected = (True, True, True, False) * 9
    assert parse(config).rope_layers == expected
    del config["no_rope_layers"]
    assert parse(config).rope_layers == expected
    del config["no_rope_layer_interval"]
    assert parse(config).rope_layers == expected
    assert parse(published("llama-3.1-8b")).rope_layers == (True,) * 32


def test_windows_by_layer():
    qwen = published("qwen2.5-7b-instruct") | {"use_sliding_window": True, "max_window_layers": 26}
    assert parse(qwen).windows == (None,) * 26 + (131072,) * 2
    kinds = ["sliding_attention", "full_attention"] * 14
    assert parse(qwen | {"layer_types": kinds}).windows == (131072, None) * 14
    assert parse(qwen | {"layer_types": kinds, "use_sliding_window": False}).windows == (None,) * 28
    smollm = published("smollm3-3b") | {"use_sliding_window": True, "sliding_window": 512}
    assert parse(smollm).windows == (None,) * 36  # its layer_types say so
    del smollm["layer_types"]
    assert parse(smollm).windows == (None, None, None, 512) * 9


def minimal(architecture: str, model_type: str) -> dict[str, Any]:
    """No key that transformers has a default for."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": 4096,
        "intermediate_size": 64,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
    }


def test_what_is_not_said_means_what_it_means_in_transformers():
    mistral = parse(minimal("MistralForCausalLM", "mistral"))
    assert (mistral.num_kv_heads, mistral.windows[0]) == (8, 4096)
    assert mistral.norm_eps == 1e-6 and not mistral.tie_embeddings
    qwen = parse(minimal("Qwen2ForCausalLM", "qwen2") | {"use_sliding_window": True})
    assert (qwen.num_kv_heads, qwen.windows) == (32, (None,) * 28 + (4096,) * 4)
    assert parse(minimal("Qwen3ForCausalLM", "qwen3") | {"hidden_size": 64}).head_dim == 128
    granite = parse(minimal("GraniteForCausalLM", "granite"))
    assert (granite.num_kv_heads, granite.attention_scale) == (32, 1.0)
    smollm = parse(minimal("SmolLM3ForCausalLM", "smollm3"))
    assert (smollm.num_kv_heads, smollm.tie_embeddings) == (4, True)
    assert smollm.rope.inv_freq[1] == pytest.approx(2e6 ** (-1 / 64))
    assert parse(minimal("LlamaForCausalLM", "llama")).rope.inv_freq[1] == pytest.approx(
        1e4 ** (-1 / 64)
    )


def test_missing_keys_agree_with_transformers_itself():
    """The same claims, where transformers is installed with all it needs to make configs."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    for name in FAMILIES:
        model_type = name.removesuffix("ForCausalLM").lower()
        config = minimal(name, model_type)
        theirs = auto.CONFIG_MAPPING[model_type](**config)
        ours = parse(config)
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.tie_embeddings == theirs.tie_word_embeddings
        theta = theirs.rope_parameters["rope_theta"]
        assert ours.rope.inv_freq[1] == pytest.approx(theta ** (-2 / ours.head_dim))
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 32)
        window = getattr(theirs, "sliding_window", None)
        assert ours.windows == (window,) * 32
        assert ours.attention_scale == getattr(theirs, "attention_multiplier", ours.head_dim**-0.5)


LLAMA = published("llama-3.1-8b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0.* will not ignore"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
        ({"architectures": ["BertModel"]}, r"BertModel.* not supported.*LlamaForCausalLM.*Granite"),
        ({"architectures": None}, r"architectures \[\].* not supported"),
        ({"model_type": "gemma"}, "model_type 'gemma'.*llama, mistral, qwen2"),
        ({"model_type": None}, "no 'model_type'"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"num_hidden_layers": None}, "no 'num_hidden_layers'"),
        ({"num_attention_heads": None}, "no 'num_attention_heads'"),
        ({"intermediate_size": None}, "no 'intermediate_size'"),
        ({"vocab_size": None}, "no 'vocab_size'"),
        ({"max_position_embeddings": None}, "no 'max_position_embeddings'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*silu"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 must be a multiple.*heads 5"),
        ({"hidden_size": 4100}, "hidden_size 4100 must be a multiple.*32"),
        ({"head_dim": 63}, "head_dim 63.* must be even"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config.*\(fp8\)"),
        ({"compression_config": {"format": "int-quantized"}}, "int-quantized"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*default, linear"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "have beta, .* 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "both rope_parameters"),
        (
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "have full_attention",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        define_model(LLAMA | changes, tensor=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", 5),
        ("architectures", [["LlamaForCausalLM"]]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", {"LlamaForCausalLM": 1}),
        ("model_type", []),
        ("model_type", ["llama"]),
        ("model_type", 5),
        ("hidden_act", ["silu"]),
        ("torch_dtype", 16),
        ("layer_types", 5),
        ("layer_types", "full_attention"),
        ("layer_types", [["full_attention"]] * 32),
        ("no_rope_layers", 5),
        ("no_rope_layer_interval", "4"),
        ("max_window_layers", "x"),
        ("tie_word_embeddings", "no"),
        ("hidden_size", 4096.5),
        ("rope_theta", "many"),
        ("rope_scaling", "linear"),
        ("rope_scaling", ["linear"]),
        ("rope_parameters", 5),
    ],
)
def test_a_value_of_another_kind_is_one_error(field: str, value: Any):
    """Whatever somebody's file holds: field and value are named, nothing is raised but this."""
    with pytest.raises(CheckpointError, match=re.escape(f"{field} of config.json")) as caught:
        define_model(LLAMA | {field: value}, tensor=1)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("linear", "factor", "2"),
        ("linear", "factor", 0),
        ("linear", "factor", [2.0]),
        ("linear", "factor", True),
        ("linear", "rope_theta", -1.0),
        ("linear", "rope_theta", {}),
        ("llama3", "low_freq_factor", "1"),
        ("llama3", "high_freq_factor", float("nan")),
        ("llama3", "high_freq_factor", 1.0),  # no higher than the low one
        ("llama3", "original_max_position_embeddings", "8192"),
        ("yarn", "beta_fast", "32"),
        ("yarn", "beta_slow", -1),
        ("yarn", "attention_factor", "1"),
        ("yarn", "mscale", [1]),
        ("default", "rope_type", ["linear"]),
    ],
)
def test_rope_values_of_another_kind_are_one_error(kind: str, field: str, value: Any):
    scaling = {"rope_type": kind, "rope_theta": 5e5} | (
        {} if kind == "default" else {"factor": 8.0, "original_max_position_embeddings": 8192}
    )
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {key: value for key, value in LLAMA.items() if not key.startswith("rope_")}
    with pytest.raises(CheckpointError, match=f"{field} .*of config.json") as caught:
        define_model(config | {"rope_parameters": scaling | {field: value}}, tensor=1)
    assert repr(value) in str(caught.value)


def test_json_that_is_nested_too_deeply(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{"architectures": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read as JSON: it is nested"):
        read_json_object(path)


@pytest.mark.parametrize(
    "layer_types",
    [["full_attention"] * 27, ["chunked_attention"] * 28, ["full_attention"] * 29],
)
@pytest.mark.parametrize("use_sliding_window", [False, True])
def test_layer_types_that_do_not_fit(layer_types: list[str], use_sliding_window: bool):
    config = published("qwen2.5-7b-instruct")
    config |= {"layer_types": layer_types, "use_sliding_window": use_sliding_window}
    with pytest.raises(CheckpointError, match="each of 28 layers"):
        define_model(config, tensor=1)


def test_rope_flags_that_do_not_fit():
    with pytest.raises(CheckpointError, match="no_rope_layers.* 36 entries, got 3"):
        define_model(published("smollm3-3b") | {"no_rope_layers": [1, 1, 0]}, tensor=1)


def test_what_never_matters_is_accepted():
    changes = {
        "_name_or_path": "somewhere",
        "attention_dropout": 0.1,
        "auto_map": {"AutoModel": "code.py"},
        "id2label": {"0": "LABEL_0"},
        "max_length": 20,
        "neftune_noise_alpha": 0.0,
        "quantization_config": None,
        "unsloth_fixed": True,
        "use_mrope": False,
    }
    assert parse(LLAMA | changes) == parse(LLAMA)


@pytest.mark.parametrize("kind", ["llama3", "linear", "yarn"])
def test_both_spellings_of_rope_are_one(kind: str):
    scaling = {"rope_type": kind, "factor": 8.0, "original_max_position_embeddings": 8192}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = LLAMA | {"rope_theta": 3e5, "rope_scaling": scaling}
    new = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = scaling | {"rope_theta": 3e5}
    oldest = old | {"rope_scaling": {**scaling, "type": kind}}
    del oldest["rope_scaling"]["rope_type"]
    assert parse(old).rope == parse(new).rope == parse(oldest).rope
    plain = parse(old | {"rope_scaling": None}).rope
    assert not np.allclose(plain.inv_freq, parse(old).rope.inv_freq)
