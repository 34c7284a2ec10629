"""Starts that cannot work: one line, the right exit code, and known before anything takes long.

`main` runs in this process. What the engine's own process must find (it has the checkpoint and
the devices) is in tests/runner/test_refusals.py; here a few go all the way through it.
"""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxinfer.cli.main import main
from jaxinfer.engine.client import ProcessClient
from tests.e2e.tiny_model import write_tiny_model

Change = Callable[[Path], None]
"""Damages a model directory."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's process is not started."""

    def refuse(self: ProcessClient, *args: object, **kwargs: object) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(ProcessClient, "__init__", refuse)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user sees."""
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.strip().splitlines()
    assert line.startswith("jaxinfer ")
    return line


def edit_json(name: str, **changes: object) -> Change:
    def change(directory: Path) -> None:
        path = directory / name
        content = json.loads(path.read_text()) if path.exists() else {}
        kept = {key: value for key, value in (content | changes).items() if value is not None}
        path.write_text(json.dumps(kept))

    return change


def write(name: str, text: str) -> Change:
    return lambda directory: (directory / name).write_text(text) and None


def remove(*names: str) -> Change:
    def change(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return change


# damage to a good directory, more flags, exit code, words of the message
IN_THE_FRONT: list[tuple[Change, list[str], int, list[str]]] = [
    (shutil.rmtree, [], 1, ["no such file or directory", "jaxinfer models list"]),
    (
        remove("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
        [],
        1,
        ["no config.json", "give the directory"],
    ),
    (write("config.json", '{"a": ['), [], 1, ["config.json", "cannot be read as JSON", "again"]),
    (write("config.json", "[1]"), [], 1, ["config.json", "a JSON object, not list"]),
    (
        remove("tokenizer.json", "tokenizer_config.json"),
        [],
        1,
        ["has no tokenizer", "tokenizer.json", "--tokenizer"],
    ),
    (
        remove("tokenizer.json", "tokenizer_config.json", "model.safetensors"),
        ["--load-format", "dummy"],
        1,
        ["has no tokenizer", "--tokenizer"],
    ),
    (write("tokenizer.json", "{}"), [], 1, ["tokenizer.json is no tokenizer", "--tokenizer"]),
    (write("tokenizer_config.json", "{"), [], 1, ["tokenizer_config.json", "JSON"]),
    (write("generation_config.json", "{"), [], 1, ["generation_config.json", "JSON"]),
    (
        edit_json("generation_config.json", temperature=-5),
        [],
        2,
        ["generation_config.json", "temperature", "-5", "--generation-config vllm"],
    ),
    (write("x.jinja", "{% for"), ["--chat-template", "x.jinja"], 2, ["x.jinja", "not valid Jinja"]),
    (lambda _: None, ["--chat-template", "nosuch.jinja"], 2, ["nosuch.jinja", "No such file"]),
    (lambda _: None, ["--tokenizer", "./no/such"], 1, ["--tokenizer=./no/such", "no such file"]),
    (lambda _: None, ["--tokenizer", "no-such-name"], 1, ["--tokenizer=no-such-name"]),
]


@pytest.mark.parametrize(("change", "flags", "code", "words"), IN_THE_FRONT)
@pytest.mark.parametrize("command", ["serve", "generate"])
def test_found_before_the_engine_is_started(
    command: str,
    change: Change,
    flags: list[str],
    code: int,
    words: list[str],
    model: Path,
    tmp_path: Path,
    no_core: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    change(directory)
    monkeypatch.chdir(directory if directory.exists() else tmp_path)
    own = {"serve": ["--port", "0"], "generate": ["-p", "x"]}[command]
    assert main([command, str(directory), *own, "--log-level", "error", *flags]) == code
    line = last_line(capsys)
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["cut short", "0 bytes"]),
        (b"hello", ["not a GGUF file"]),
        (b"GGUF\3\0\0\0" + b"\1" + bytes(7) + b"\1" + bytes(7) + b"\xff" * 9, ["cut short", "33"]),
    ],
)
def test_gguf_files_that_are_none(
    content: bytes,
    words: list[str],
    tmp_path: Path,
    no_core: None,
    capsys: pytest.CaptureFixture[str],
):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert main(["serve", str(file), "--port", "0", "--log-level", "error"]) == 1
    line = last_line(capsys)
    for word in [str(file), *words]:
        assert word in line, line


def test_a_port_in_use_is_known_before_the_model_is_looked_for(
    capsys: pytest.CaptureFixture[str],
):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "./no/such/model", "--port", str(port)]) == 2
    line = last_line(capsys)
    assert f"--port={port}" in line
    assert "Choose another port" in line


def test_an_address_of_another_machine(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "./no/such/model", "--host", "192.0.2.1"]) == 2
    assert "--host='192.0.2.1' is not an address of this machine" in last_line(capsys)


def test_a_prompt_that_cannot_be_used(
    model: Path, tmp_path: Path, no_core: None, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", str(model), "-p", ""]) == 2
    assert "prompt is empty" in last_line(capsys)
    mute = tmp_path / "mute"
    shutil.copytree(model, mute)
    edit_json("tokenizer_config.json", chat_template=None)(mute)
    assert main(["chat", str(mute)]) == 2
    assert "no chat template" in last_line(capsys)
    assert main(["generate", str(mute), "--chat", "-p", "x"]) == 1
    assert "no chat template" in last_line(capsys)


@pytest.mark.parametrize(
    ("change", "flags", "code", "words"),
    [
        (remove("model.safetensors"), [], 1, ["no *.safetensors file"]),
        (edit_json("config.json", architectures=["GPT2LMHeadModel"]), [], 1, ["GPT2", "Llama"]),
        (lambda _: None, ["--max-model-len", "9999"], 2, ["max_model_len=9999", "512"]),
    ],
)
def test_what_the_engine_process_finds_is_told_once(
    change: Change,
    flags: list[str],
    code: int,
    words: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    change(directory)
    assert main(["serve", str(directory), "--port", "0", "--log-level", "error", *flags]) == code
    line = last_line(capsys)
    for word in words:
        assert word in line, line
