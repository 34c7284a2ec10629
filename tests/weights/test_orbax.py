"""Orbax: what is converted reads back bit for bit, one tensor at a time."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.errors import CheckpointError
from jaxinfer.models.pieces import Piece
from jaxinfer.weights.loader import load_params
from jaxinfer.weights.orbax import OrbaxReader, convert_checkpoint
from jaxinfer.weights.reader import detect_format, open_checkpoint
from tests.weights.checkpoints import CONFIG, write_shards

TENSORS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32)
    .reshape(3, 4)
    .astype(ml_dtypes.bfloat16),
    "model.layers.0.mlp.up_proj.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.norm.weight": np.ones(4, np.float16),
}


@pytest.fixture
def source(tmp_path):
    directory = write_shards(tmp_path / "hf", {"model.safetensors": TENSORS}, index=False)
    (directory / "generation_config.json").write_text('{"temperature": 0.5}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "README.md").touch()
    return directory


def test_a_directory_round_trip(source, tmp_path):
    out = tmp_path / "orbax model"
    convert_checkpoint(open_checkpoint(source), out)
    assert detect_format(out) == "orbax"
    reader = open_checkpoint(out)
    assert isinstance(reader, OrbaxReader)
    assert reader.config() == CONFIG
    assert reader.generation_config() == {"temperature": 0.5}
    assert set(reader.tensors()) == set(TENSORS)
    for name, expected in TENSORS.items():
        info, read = reader.tensors()[name], reader.read(name)
        assert (info.shape, info.dtype) == (expected.shape, expected.dtype)
        assert read.dtype == expected.dtype and read.tobytes() == expected.tobytes()
    reader.close()
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "orbax",
    }
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_it_loads_from_several_threads(source, tmp_path):
    convert_checkpoint(open_checkpoint(source), tmp_path / "out")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(
        open_checkpoint(tmp_path / "out"),
        {
            name: jax.ShapeDtypeStruct(array.shape, np.float32, sharding=sharding)
            for name, array in TENSORS.items()
        },
        {
            name: (Piece(name=name, shape=array.shape, arrange=lambda a: a),)
            for name, array in TENSORS.items()
        },
        packings={},
        optional_names=lambda name: False,
        on_progress=lambda *_: None,
    )
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(np.asarray(params[name]), expected.astype(np.float32))


def test_an_output_that_is_in_use_is_not_touched(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        convert_checkpoint(open_checkpoint(source), out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    convert_checkpoint(open_checkpoint(source), out)
    assert detect_format(out) == "orbax"


def test_a_damaged_checkpoint_is_named(source, tmp_path):
    out = tmp_path / "out"
    convert_checkpoint(open_checkpoint(source), out)
    reader = open_checkpoint(out)
    for file in (out / "orbax").rglob("d/*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read|is no complete"):
        reader.read("model.norm.weight")
    (out / "orbax" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="no complete Orbax checkpoint"):
        open_checkpoint(out)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_gguf_becomes_a_model_directory_with_its_tokenizer(smollm2_gguf, tmp_path):
    from jaxinfer.tokenizer.tokenizer import load_tokenizer

    gguf_reader = open_checkpoint(smollm2_gguf)
    convert_checkpoint(gguf_reader, tmp_path / "out")
    reader = open_checkpoint(tmp_path / "out")
    assert reader.config() == gguf_reader.config()
    assert 2 in np.atleast_1d(reader.generation_config()["eos_token_id"])
    assert reader.tensors() == gguf_reader.tensors()
    for name in ("model.norm.weight", "model.layers.7.self_attn.q_proj.weight"):
        np.testing.assert_array_equal(reader.read(name), gguf_reader.read(name))
    text = "Grüße, 123 tokens <|im_end|>"
    before, after = load_tokenizer(smollm2_gguf), load_tokenizer(tmp_path / "out")
    assert after.encode(text) == before.encode(text)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 49152
