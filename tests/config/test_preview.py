"""--dry-run: the settings as YAML that means the same when it is read again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.cli.main import main
from jaxinfer.config.fields import build, flatten
from jaxinfer.config.load import read_yaml
from jaxinfer.config.preview import OPEN, local_model_facts, preview
from jaxinfer.config.resolve import DeviceFacts, ModelFacts, resolve
from jaxinfer.config.schema import CompileConfig, EngineConfig, ModelConfig, ServeConfig
from jaxinfer.errors import ConfigError

MODEL = ModelFacts(max_position_embeddings=4096, dtype="float16")


def engine(device: Any = "auto", **model: Any) -> EngineConfig:
    return EngineConfig(model=ModelConfig(**model), compile=CompileConfig(device=device))


def line_of(name: str, text: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith(f"{name}:")]
    return line


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_shown_as_chosen_is_what_is_chosen(platform: str, dtype: str):
    config = engine(platform)
    model = ModelFacts(max_position_embeddings=4096, dtype=dtype)
    device = DeviceFacts(platform=platform, device_kind="x", num_devices=8, memory_bytes=1)
    resolved = flatten(resolve(config, model, device).config)
    shown = yaml.safe_load(preview(config, {}, model=model))
    assert all(shown[name] in (resolved[name], "auto") for name in resolved)
    again = build(EngineConfig, shown)
    assert flatten(resolve(again, model, device).config) == resolved
    known = yaml.safe_load(preview(config, {}, model=None))
    again = build(EngineConfig, known)
    assert flatten(resolve(again, model, device).config) == resolved, "read again it is the same"
    differing = {name for name in known if known[name] != resolved[name]}
    assert "max_model_len" in differing
    assert all(known[name] in (None, "auto") for name in differing), "unknown, and not wrong"


def test_without_a_device_only_what_does_not_depend_on_it_is_chosen():
    text = preview(engine(), {}, model=MODEL)
    shown = yaml.safe_load(text)
    assert shown["max_model_len"] == 4096
    assert (shown["device"], shown["dtype"], shown["max_num_seqs"]) == ("auto", "auto", None)
    assert "# auto: float32 on a CPU" in line_of("dtype", text)
    assert "# auto: the model's max_position_embeddings" in line_of("max_model_len", text)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens"])
def test_the_words_on_what_depends_on_the_device_are_true(name: str):
    line = line_of(name, preview(engine(), {}, model=None))
    for platform in ("cpu", "tpu", "gpu"):
        device = DeviceFacts(platform=platform, device_kind="x", num_devices=1, memory_bytes=1)
        chosen = flatten(resolve(engine(), MODEL, device).config)[name]
        place = "on a CPU" if platform == "cpu" else f"(?:on a {platform.upper()}|elsewhere)"
        assert re.search(rf"\b{chosen} {place}", line), line


def test_every_comment_is_about_a_setting():
    names = flatten(ServeConfig()).keys() | {"concurrency"}
    assert OPEN.keys() <= names


def test_a_setting_that_the_model_cannot_have():
    with pytest.raises(ConfigError, match="max_model_len=9999 is above"):
        preview(engine(max_model_len=9999), {}, model=MODEL)


@settings(deadline=None, max_examples=50)
@given(
    st.text(max_size=20),
    st.floats(0.001, 1.0),
    st.lists(st.text(min_size=1, max_size=8), max_size=3),
)
def test_any_value_is_read_back(text: str, number: float, names: list[str]):
    rest = {"a": text, "b": number, "c": names, "d": {"x": text}, "e": None, "f": True}
    shown = yaml.safe_load(preview(engine("cpu"), rest, model=MODEL, sections={"s": rest}))
    assert {name: shown[name] for name in rest} == rest
    assert shown["s"] == rest


def test_serve_shows_what_it_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(
        json.dumps({"max_position_embeddings": 77, "torch_dtype": "float16"})
    )
    argv = ["serve", str(tmp_path), "--port", "1234", "--api-key", "secret", "--dry-run"]
    assert main([*argv, "--device", "gpu"]) == 0
    text = capsys.readouterr().out
    assert "secret" not in text
    assert "1 given, not shown" in line_of("api_key", text)
    assert line_of("max_model_len", text).startswith("max_model_len: 77  # auto")
    assert line_of("dtype", text) == "dtype: float16  # auto: the checkpoint's"
    (tmp_path / "shown.yaml").write_text(text)
    values = read_yaml(tmp_path / "shown.yaml", ServeConfig)
    assert (values["port"], values["max_model_len"], values["served_model_name"]) == (1234, 77, [])
    assert main(["serve", "--dry-run", "--max-num-seqs", "0"]) == 2


def test_facts_of_models_that_are_not_here_or_damaged(tmp_path: Path):
    assert local_model_facts("owner/name") is None
    assert local_model_facts(str(tmp_path)) is None
    for content in ("{", "[]", "{}", '{"max_position_embeddings": "x"}'):
        (tmp_path / "config.json").write_text(content)
        assert local_model_facts(str(tmp_path)) is None
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert local_model_facts(str(tmp_path / "x.gguf")) is None


@pytest.mark.model
def test_facts_of_a_gguf_file(smollm2_gguf: Path):
    facts = local_model_facts(str(smollm2_gguf))
    assert facts is not None
    assert facts.max_position_embeddings == 8192
