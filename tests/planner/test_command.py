"""The commands as users call them, with the real child process; and what is said of bad input."""

import json
from pathlib import Path

import pytest

from jaxinfer.cli.main import main
from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.core.progress import ignore_progress
from jaxinfer.planner import launch
from jaxinfer.runner.build import build_runner
from tests.runner.tiny_llama import TinyLlama

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


def test_a_compiled_plan_is_what_a_start_plans(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    """With the compiler of this machine: pages, temporaries and arguments are the engine's own."""
    model = TinyLlama().save(tmp_path / "model")
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64}
    flags = [
        word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    argv = ["plan", str(model), "--topology", "cpu", "--json", "--no-native-kernels"]
    assert main([*argv, *map(str, flags)]) == 0
    said = capfd.readouterr()
    result = json.loads(said.out)
    for name in ("decode 2x2", "mixed 16x2"):
        assert f"compiled {name}, all of it with 2 layer(s), in" in said.err
    config = engine_config_from_kwargs(
        model=str(model), compile_cache="none", native_kernels=False, **settings
    )
    runner = build_runner(config, ignore_progress)
    runner.close()
    memory, programs = result["memory"], result["programs"]
    assert memory["num_pages"] == runner.limits.num_pages
    assert memory["weight_bytes"] == runner.memory.weight_bytes
    assert max(row["temp_bytes"] for row in programs) == runner.memory.temp_bytes
    # More than was guessed for so small a step: the plan was made again, as the start's was.
    assert memory["step_bytes"] == runner.memory.temp_bytes
    assert all(row["moved_bytes"] > 0 for row in programs)
    beside = result["padding_bytes"] + (result["code_bytes"] or 0)
    assert result["needed_bytes"] == runner.memory.total_bytes + beside


def test_no_is_an_answer_too(capfd: pytest.CaptureFixture[str]):
    code = main(["plan", str(CONFIG), "--topology", "v5e:1x1", "--no-compile", "--json"])
    result = json.loads(capfd.readouterr().out)
    assert code == 1
    assert not result["fits"]
    assert "needs" in result["why_not"]
    assert any("--topology v5e:2x2" in item["flags"] for item in result["alternatives"])
    assert all(item["fits"] for item in result["alternatives"])
    memory = result["memory"]  # as far as it was divided
    assert memory["weight_bytes"] > memory["usable_bytes"]
    assert memory["num_pages"] == 0


def test_a_compiler_that_dies_is_no_answer(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Neither a "no" nor bad input: the child process ends by a signal."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(launch, "_code_of_child", lambda kind, log_level: code)
    assert main(["plan", str(CONFIG), "--topology", "h100", "--json"]) == 3
    said = capfd.readouterr()
    assert "the planner's process ended early (signal 9)" in said.err
    assert said.out == ""


def test_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit code 0: it fits, 1: it does not, 2: something that was given is wrong, 3:" in text


def test_the_childs_errors_are_the_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "config.json").write_text('{"architectures": [')
    assert main(["plan", str(tmp_path), "--topology", "h100", "--no-compile"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/config.json cannot be read as JSON" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--topology", "v9z"], "topology='v9z' is not known. Known are v5e:1x1"),
        ([], "--topology"),
        (["--topology", "h100", "--input-len", "0"], "--input-len must be at least 1"),
        (["--topology", "cpux0"], "topology='cpux0' has 0 devices"),
        *(
            (["--topology", "h100", "--price-per-hour", price], "--price-per-hour must be a number")
            for price in ("-1", "0", "nan", "inf")
        ),
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
    assert main(["plan", model, *flags]) == 2
    assert says in capsys.readouterr().err


def test_build_says_where_programs_go(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    flags = ["--topology", "cpu", "-o", str(tmp_path), "--compile-cache", str(tmp_path / "other")]
    assert main(["build", str(CONFIG), *flags]) == 2
    assert "the programs go where --output says" in capsys.readouterr().err
