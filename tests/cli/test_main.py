"""The command itself: fast, lazy, and clear when something is wrong."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxinfer.cli.main import COMMANDS, main

SLOW_IMPORTS = ("jax", "numpy", "yaml", "aiohttp", "rich", "tokenizers", "transformers", "msgspec")


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def run_jaxinfer(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxinfer.cli.main", *argv]
    return subprocess.run(command, capture_output=True, text=True, input=stdin)


def test_help_is_fast_and_imports_nothing_slow():
    walls_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        result = run_jaxinfer("--help")
        walls_s.append(time.perf_counter() - start_s)
        assert result.returncode == 0
        assert all(name in result.stdout for name in COMMANDS)
    assert min(walls_s) < 0.5
    result = run_python(
        "import sys; from jaxinfer.cli.main import main; main(['--help']);"
        f"print([name for name in {SLOW_IMPORTS!r} if name in sys.modules], file=sys.stderr)"
    )
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "bench throughput"])
def test_help_of_a_command_names_its_flags_without_jax(command: str):
    result = run_python(
        "import sys; from jaxinfer.cli.main import main\n"
        f"try: main({[*command.split(), '--help']!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'jax' not in sys.modules and 'torch' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr
    assert "--max-model-len" in result.stdout
    assert f"jaxinfer {command}" in result.stdout


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["serv"], 2, ["'serv'", "serve"]),
        (["models", "lst"], 2, ["'lst'", "list"]),
        (["bench", "thruput"], 2, ["'thruput'", "throughput"]),
        (["serve", "--prot", "1"], 2, ["--prot", "--port"]),
        (["serve", "--port", "99999"], 2, ["port", "99999", "65535"]),
        (["serve", "--quantization", "fp8"], 2, ["quantization", "not supported yet"]),
        (["generate", "m", "-p", "x", "--temperature", "hot"], 2, ["temperature", "hot"]),
        (["generate", "m", "-p", "x", "--temperature", "-1"], 2, ["--temperature", "-1"]),
        (["chat", "m", "--top-p", "2"], 2, ["--top-p", "2"]),
        (["chat", "m", "--top-p", "nan"], 2, ["--top-p", "nan"]),
        (["generate", "m", "-p", "x", "--max-tokens", "0"], 2, ["--max-tokens", "at least 1"]),
        (["generate", "m", "-p", "x", "--stop", ""], 2, ["--stop", "non-empty"]),
        (["chat", "--sytem", "x"], 2, ["--sytem", "--system"]),
        (["models", "show", "no-such-model"], 1, ["no-such-model"]),
        (["models", "pull", "./no/such/directory"], 1, ["./no/such/directory"]),
        (["models", "convert", "m"], 2, ["--output"]),
        (["bench", "throughput", "--num-prompts", "0"], 2, ["--num-prompts", "0"]),
        (["bench", "throughput", "--workloads", "peers", "--only", "9"], 2, ["only", "9"]),
        (["generate", "m", "-p", "x", "--log-level", "loud"], 2, ["--log-level", "loud"]),
        (["info", "--jsn"], 2, ["--jsn", "--json"]),
    ],
)
def test_errors_are_one_line_with_a_repair(
    argv: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jaxinfer")
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    for word in words:
        assert word in captured.err


def test_debug_shows_where_an_error_comes_from():
    result = run_jaxinfer("serve", "--port", "99999", "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_nothing_given_shows_the_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "serve" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path):
    command = (
        f"{sys.executable} -m jaxinfer.cli.main models list | head -c 1; exit ${{PIPESTATUS[0]}}"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr and "Broken pipe" not in result.stderr
    assert result.returncode in (0, 1)
