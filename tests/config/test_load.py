"""Flags, YAML and keyword arguments: one meaning, one wording of errors, clear precedence."""

import argparse
import contextlib
import functools
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.cli.parser import Parser
from jaxinfer.config.fields import build, flatten, settings_of
from jaxinfer.config.load import add_flags, engine_config_from_kwargs, serve_config
from jaxinfer.config.schema import EngineConfig, ServeConfig
from jaxinfer.errors import ConfigError


@functools.cache
def serve_parser() -> Parser:
    """Made once: to make it takes far longer than to parse."""
    parser = Parser(prog="jaxinfer serve")
    add_flags(parser, ServeConfig, model_argument=True)
    return parser


def parse(*argv: str) -> ServeConfig:
    return serve_config(serve_parser().parse(argv))


def yaml_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return str(path)


def test_no_flags_give_the_defaults():
    assert parse() == ServeConfig()


def test_every_setting_has_one_name_a_help_and_survives_flatten():
    for config_type in (EngineConfig, ServeConfig):
        settings = settings_of(config_type)
        assert all(setting.help for setting in settings.values())
        config = config_type()
        assert set(flatten(config)) == set(settings)
        assert build(config_type, flatten(config)) == config


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["org/model"], "model", "org/model"),
        (["--model", "org/model"], "model", "org/model"),
        (["--max-model-len", "1024"], "max_model_len", 1024),
        (["--max_model_len=1k"], "max_model_len", 1000),
        (["--max-model-len", "32K"], "max_model_len", 32768),
        (["--max-model-len", "25.6k"], "max_model_len", 25600),
        (["--max-model-len", "auto"], "max_model_len", None),
        (["--kv-cache-memory-bytes", "2G"], "kv_cache_memory_bytes", 2**31),
        (["-tp", "4"], "tensor_parallel_size", 4),
        (["--tp", "4"], "tensor_parallel_size", 4),
        (["--memory-utilization", "0.5"], "gpu_memory_utilization", 0.5),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--disable-log-requests"], "disable_log_requests", True),
        (["--api-key", "a,b", "c", "--api-key", "d"], "api_key", ["a,b", "c", "d"]),
        (["--token-buckets", "16,64", "256"], "token_buckets", [16, 64, 256]),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--chat-template", "-"], "chat_template", "-"),
    ],
)
def test_a_flag_sets_its_setting(argv: list[str], name: str, value: Any):
    assert flatten(parse(*argv)) == flatten(ServeConfig()) | {name: value}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-model-len", "many"], ["--max-model-len", "integer", "'many'"]),
        (["--max-model-len", "1.5K"], ["--max-model-len", "'1.5K'"]),
        (["--port", "80.5"], ["--port", "integer", "'80.5'"]),
        (["--port", "1k"], ["--port", "'1k'"]),
        (["--dtype", "int3"], ["--dtype", "bfloat16", "'int3'"]),
        (["--gpu-memory-utilization", "most"], ["--gpu-memory-utilization", "number"]),
        (["--speculative-config", "{"], ["--speculative-config", "JSON"]),
        (["--speculative-config", "[1]"], ["--speculative-config", "JSON object"]),
        (["--max-modal-len", "5"], ["--max-modal-len", "--max-model-len"]),
        (["--no-enable-prefix-cachin"], ["--no-enable-prefix-caching"]),
        (["--enforce-eager"], ["--enforce-eager", "compile"]),
        (["--max-model-len"], ["--max-model-len", "expected one argument"]),
        (["a", "--model", "b"], ["'a'", "'b'"]),
        (["a", "b"], ["'b'"]),
        (["--max-model", "5"], ["--max-model"]),  # no abbreviations
    ],
)
def test_a_wrong_flag_says_what_is_wrong(argv: list[str], words: list[str]):
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--quantization", "fp8"],
        ["-q", "fp8"],
        ["--speculative-config", '{"method": "ngram"}'],
        ["--enable-expert-parallel"],
        ["--pipeline-parallel-size", "2"],
        ["--data-parallel-size", "2"],
        ["--tool-call-parser", "hermes"],
        ["--reasoning-parser", "qwen3"],
        ["--api-server-count", "2"],
        ["--trust-remote-code"],
    ],
)
def test_what_this_version_cannot_do_is_refused_by_name(argv: list[str]):
    name = argv[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigError, match="not supported yet|refused") as error:
        parse(*argv)
    assert ("quantization" if name == "_q" else name) in str(error.value)


def test_command_line_beats_file_beats_default(tmp_path: Path):
    path = yaml_file(tmp_path, "port: 9000\nmax-num-seqs: 8\nserved_model_name: [a, b]\n")
    config = parse("--config", path, "--port", "9001")
    assert config.server.port == 9001
    assert config.engine.scheduler.max_num_seqs == 8
    assert config.server.served_model_name == ["a", "b"]
    assert config.server.host == ServeConfig().server.host


def test_yaml_takes_units_aliases_null_and_a_single_item(tmp_path: Path):
    text = "max_model_len: 2K\ntp: 2\nrevision: null\napi-key: secret\nasync_scheduling: false\n"
    config = parse("--config", yaml_file(tmp_path, text))
    assert config.engine.model.max_model_len == 2048
    assert config.engine.parallel.tensor_parallel_size == 2
    assert config.engine.model.revision is None
    assert config.server.api_key == ["secret"]
    assert config.engine.scheduler.async_scheduling is False


def test_an_empty_file_changes_nothing(tmp_path: Path):
    assert parse("--config", yaml_file(tmp_path, "# nothing\n")) == ServeConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_modal_len: 5", ["serve.yaml", "'max_modal_len'", "max_model_len"]),
        ("enforce-eager: true", ["serve.yaml", "enforce-eager", "compiled"]),
        ("zzz: 5", ["serve.yaml", "'zzz'"]),
        ("port: yes", ["serve.yaml", "port", "integer", "True"]),
        ("enable_prefix_caching: 1", ["enable_prefix_caching", "true or false", "1"]),
        ("model: 5", ["model", "text", "5"]),
        ("model: null", ["model", "None"]),
        ("served_model_name: [1]", ["served_model_name", "[1]"]),
        ("token_buckets: [a]", ["token_buckets", "'a'"]),
        ("dtype: [float32]", ["dtype", "one of"]),
        ("port: 1\nport-: 2", ["'port-'"]),
        ("max-num-seqs: 1\nmax_num_seqs: 2", ["max_num_seqs", "twice"]),
        ("5: 1", ["unknown name 5"]),
        ("- port", ["serve.yaml", "list"]),
        ("port: [", ["serve.yaml", "YAML", "line 1"]),
        ("port: 1\nport: 2", ["serve.yaml", "line 2", "port is given twice"]),
        ("a: {b: 1, b: 2}", ["serve.yaml", "b is given twice"]),
    ],
)
def test_a_wrong_file_names_file_key_and_value(tmp_path: Path, text: str, words: list[str]):
    with pytest.raises(ConfigError) as error:
        parse("--config", yaml_file(tmp_path, text))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="absent.yaml"):
        parse("--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        parse("--config", str(tmp_path / "binary.yaml"))


def test_ready_made_files_are_valid():
    files = sorted(Path("configs/serve").glob("*.yaml"))
    assert files
    for path in files:
        parse("--config", str(path))


def test_keyword_arguments_have_the_same_names():
    config = engine_config_from_kwargs(model="m", max_model_len="1K", tensor_parallel_size=2)
    assert config.model.model == "m"
    assert config.model.max_model_len == 1024
    assert config.parallel.tensor_parallel_size == 2
    with pytest.raises(ConfigError, match="Did you mean max_num_seqs"):
        engine_config_from_kwargs(max_num_seq=5)
    with pytest.raises(ConfigError, match="port"):
        engine_config_from_kwargs(port=5)
    with pytest.raises(ConfigError, match="block_size"):
        engine_config_from_kwargs(block_size=12)


def test_the_configuration_goes_over_a_wire():
    config = parse("--api-key", "a", "--token-buckets", "16", "--max-model-len", "100")
    assert msgspec.json.decode(msgspec.json.encode(config), type=ServeConfig) == config


@given(st.lists(st.text(max_size=12), max_size=4))
def test_no_command_line_crashes(argv: list[str]):
    if "-h" in argv or "--help" in argv:
        return
    with contextlib.suppress(ConfigError):
        parse(*argv)


def test_help_names_every_flag():
    parser = Parser(prog="jaxinfer serve")
    add_flags(parser, ServeConfig, model_argument=True)
    text = parser.format_help()
    assert isinstance(parser, argparse.ArgumentParser)
    for setting in settings_of(ServeConfig).values():
        assert setting.flag in text
