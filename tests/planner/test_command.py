"""The commands as users call them, with the real child process; and what is said of bad input."""

import json
from pathlib import Path

import pytest

from jaxinfer.cli.main import main

CONFIG = Path(__file__).parent / "configs" / "llama-3.1-8b-instruct.json"


def test_a_plan_from_a_config_alone(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "config.json").write_bytes(CONFIG.read_bytes())
    flags = ["--topology", "v6e:2x2", "--tensor-parallel-size", "4", "--max-model-len", "8K"]
    code = main(["plan", str(tmp_path), *flags, "--no-compile", "--price-per-hour", "10.8"])
    out = capfd.readouterr().out
    assert code == 0
    assert "fits on v6e:2x2" in out
    assert "weights" in out
    assert "3.74 GiB" in out
    assert "per 1M" in out
    assert "Assumptions" in out


def test_no_is_an_answer_too(capfd: pytest.CaptureFixture[str]):
    code = main(["plan", str(CONFIG), "--topology", "v5e:1x1", "--no-compile", "--json"])
    result = json.loads(capfd.readouterr().out)
    assert code == 1
    assert not result["fits"]
    assert "needs" in result["why_not"]
    assert any("--topology v5e:2x2" in item["flags"] for item in result["alternatives"])
    assert all(item["fits"] for item in result["alternatives"])


def test_the_childs_errors_are_the_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "config.json").write_text('{"architectures": [')
    assert main(["plan", str(tmp_path), "--topology", "h100", "--no-compile"]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/config.json cannot be read as JSON" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--topology", "v9z"], "topology='v9z' is not known. Known are v5e:1x1"),
        ([], "--topology"),
        (["--topology", "h100", "--input-len", "0"], "--input-len must be at least 1"),
        (["--topology", "h100", "--price-per-hour", "-1"], "--price-per-hour must be above 0"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], argv: list[str], says: str):
    assert main(["plan", str(CONFIG), *argv]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("llama-3.3-70b-instruct", "its config.json is not on this machine"),
        ("lama-3.3-70b-instruct", "did you mean llama-3.3-70b-instruct"),
        ("{empty}", "has no config.json"),
        ("{text}", "neither a config.json nor a .gguf file"),
    ],
)
def test_models_that_are_not_here(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    says: str,
):
    (tmp_path / "empty").mkdir()
    text = tmp_path / "model.txt"
    text.write_text("")
    model = model.format(empty=tmp_path / "empty", text=text)
    flags = ["--topology", "h100", "--download-dir", str(tmp_path / "hub")]
    assert main(["plan", model, *flags]) == 1
    assert says in capsys.readouterr().err


def test_build_says_where_programs_go(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    flags = ["--topology", "cpu", "-o", str(tmp_path), "--compile-cache", str(tmp_path / "other")]
    assert main(["build", str(CONFIG), *flags]) == 2
    assert "the programs go where --output says" in capsys.readouterr().err
