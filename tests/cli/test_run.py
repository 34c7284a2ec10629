"""`run` and `run-batch` as a user has them: processes, signals, exit codes; made-up tokens."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
import yaml

from jaxinfer.cli.main import main
from tests.batch.echo import request_line, write_requests
from tests.batch.run_fake import start
from tests.server.conftest import tokenizer_dir as tokenizer_dir  # a fixture

Process = subprocess.Popen[str]
ROOT = Path(__file__).parents[2]
ENGINE = ("--max-model-len=64", "--max-num-seqs=4", "--max-num-batched-tokens=16")


@pytest.fixture
def model(tokenizer_dir: Path) -> str:
    """A directory with a tokenizer in it; the made-up device needs no more."""
    return str(tokenizer_dir)


def command(factory: str, *argv: str) -> list[str]:
    return [sys.executable, "-m", "tests.batch.run_fake", factory, *argv]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def begun(target: Path, *argv: str, factory: str = "build_slow") -> Iterator[Process]:
    """A process that has written its first answers; it is gone at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command(factory, *argv), cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            deadline_s = time.monotonic() + 60
            while not (target.exists() and target.read_bytes().count(b"\n") > 3):
                assert process.poll() is None
                assert time.monotonic() < deadline_s, "it never wrote anything"
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def test_run_batch_answers_a_file_and_then_has_nothing_to_do(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "model": "mine"}
    chat_line = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    source.write_text(
        "".join(request_line(index, max_tokens=4) for index in range(20))
        + json.dumps(chat_line)
        + "\nnonsense\n"
        + request_line(22, model="other")
        + request_line(23, prompt="x" * 100)
    )
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--model", model, *ENGINE]
    argv += ["--served-model-name", "mine"]
    result = subprocess.run(
        command("build_runner", *argv), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert f"done: 24 lines (21 ok, 3 failed, 0 done before): {target}" in result.stdout
    found = {record["line"]: record for record in records(target)}
    assert sorted(found) == list(range(1, 25))
    assert found[1]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert found[21]["response"]["body"]["object"] == "chat.completion"
    assert [found[line]["response"]["status_code"] for line in (22, 23, 24)] == [400, 404, 400]
    assert "context length is 64 tokens" in found[24]["error"]["message"]
    content = target.read_bytes()
    assert start("build_crash", *argv) == 0, "no engine is started"
    assert "(0 ok, 0 failed, 24 done before)" in capsys.readouterr().out
    assert target.read_bytes() == content


def test_run_asks_about_rows_and_writes_parquet(model: str, tmp_path: Path):
    (tmp_path / "in.csv").write_text("name,colour\napple,red\nsky,blue\n,none\n")
    job = {
        "model": model,
        "max-model-len": 64,
        "max_num_seqs": 4,
        "max-num-batched-tokens": 16,
        "sampling": {"max_tokens": 3, "temperature": 0},
        "inputs": {"path": str(tmp_path / "in.csv"), "template": "{name}?", "id-column": "name"},
        "outputs": {"path": str(tmp_path / "out.parquet")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert start("build_runner", "run", str(tmp_path / "job.yaml")) == 0
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["line"], row["custom_id"]) for row in rows] == [(1, "apple"), (2, "sky"), (3, "")]
    assert all(len(row["text"]) == row["completion_tokens"] == 3 for row in rows)


def test_a_signal_ends_it_in_order_and_it_can_go_on(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = write_requests(tmp_path / "in.jsonl", 300), tmp_path / "out.jsonl"
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--model", model, *ENGINE]
    with begun(target, *argv) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "lines in work get 20 s; once more to end at once" in stderr
    assert "stopped by SIGTERM: " in stdout
    assert "start the same command again to go on" in stdout
    assert not [child for child in children if child.is_running()]
    num_done = len(records(target))
    assert 0 < num_done < 300
    assert f"{num_done} of 300 lines are done" in stdout
    assert start("build_runner", *argv) == 0
    counts = f"({300 - num_done} ok, 0 failed, {num_done} done before)"
    assert f"done: 300 lines {counts}" in capsys.readouterr().out
    assert sorted(record["line"] for record in records(target)) == list(range(1, 301))


def test_a_second_signal_ends_it_at_once(model: str, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [request_line(index, max_tokens=2) for index in range(5)]
    source.write_text("".join(lines) + request_line(5, max_tokens=1900, ignore_eos=True))
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--model", model, *ENGINE]
    argv += ["--concurrency=1", "--shutdown-timeout=3600", "--max-model-len=2000"]
    with begun(target, *argv) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None, "lines in work may finish"
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT: 5 of 6 lines are done" in stdout
    assert len(records(target)) == 5


def test_killed_in_the_middle_and_started_again(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The whole program; tests/batch/test_kill.py does it often."""
    source, target = write_requests(tmp_path / "in.jsonl", 300), tmp_path / "out.jsonl"
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--model", model, *ENGINE]
    with begun(target, *argv) as process:
        assert start("build_runner", *argv) == 2
        assert "another run is writing" in capsys.readouterr().err
        process.kill()
    assert start("build_runner", *argv) == 0
    captured = capsys.readouterr()
    assert "0 failed" in captured.out
    assert "going on: " in captured.err
    assert sorted(record["line"] for record in records(target)) == list(range(1, 301))


def test_an_engine_that_is_lost_for_good_ends_the_job_and_loses_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = write_requests(tmp_path / "in.jsonl", 12), tmp_path / "out.jsonl"
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--model", model, *ENGINE]
    assert start("build_failing", *argv, "--engine-max-restarts=0") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "Nothing is lost: start the same command again to go on." in last
    assert all(record["response"]["status_code"] == 200 for record in records(target))
    assert start("build_runner", *argv) == 0
    assert sorted(record["line"] for record in records(target)) == list(range(1, 13))


def test_a_line_that_kills_the_core_each_time_costs_itself_only(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [request_line(index, max_tokens=8) for index in range(12)]
    lines[5] = request_line(5, prompt="! boo", max_tokens=8)
    source.write_text("".join(lines))
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--model", model, *ENGINE]
    argv += ["--engine-max-restarts=2"]
    assert start("tests.batch.killer_runner:build_killer", *argv) == 0
    assert "(11 ok, 1 failed, 0 done before)" in capsys.readouterr().out
    found = {record["line"]: record for record in records(target)}
    assert sorted(found) == list(range(1, 13))
    assert found[6]["response"]["status_code"] == 500
    message = found[6]["error"]["message"]
    assert "in.jsonl:6: the engine was lost each time it worked on this line" in message
    assert "ended by signal 9" in message


# ------------------------------------------------------------------ without starting anything


def job_file(tmp_path: Path, **content: Any) -> str:
    write_requests(tmp_path / "in.jsonl", 1)
    job = {
        "inputs": {"path": str(tmp_path / "in.jsonl")},
        "outputs": {"path": str(tmp_path / "out.jsonl")},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**job, **content}))
    return str(path)


def test_a_dry_run_says_what_the_settings_come_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = job_file(tmp_path, sampling={"temperature": 0.5}, device="cpu")
    assert main(["run", path, "--dry-run", "--max-num-seqs", "5"]) == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert shown["max_num_seqs"] == 5
    assert shown["sampling"] == {"temperature": 0.5}
    assert shown["inputs"]["path"] == [str(tmp_path / "in.jsonl")]
    assert "max_num_batched_tokens: 512  # auto: usual on cpu" in text
    (tmp_path / "shown.yaml").write_text(text)
    assert main(["run", str(tmp_path / "shown.yaml"), "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == shown, "it says the same when it is read"
    assert not (tmp_path / "out.jsonl").exists()
    argv = ["run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "o.parquet")]
    assert main([*argv, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["inputs"]["format"] == "openai"
    assert main([*argv[:-1], str(tmp_path / "o.jsonl.gz"), "--dry-run"]) == 2
    assert "not packed" in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"max-num-seq": 3}, ["job.yaml", "'max-num-seq'", "Did you mean max_num_seqs?"]),
        ({"samplng": {}}, ["'samplng'", "section sampling"]),
        ({"port": 8000}, ["port is a setting of the HTTP server"]),
        ({"template": "{x}"}, ["template belongs into the section inputs"]),
        ({"inputs": {"paht": "x"}}, ["job.yaml: inputs", "'paht'", "Did you mean path?"]),
        ({"inputs": {"path": "x", "mode": "talk"}}, ["mode", "chat, completion", "'talk'"]),
        ({"inputs": {}}, ["inputs.path must name at least one file"]),
        ({"inputs": [1]}, ["inputs: expected `name: value` lines"]),
        ({"outputs": {}}, ["outputs.path must name where"]),
        ({"outputs": {"path": "x", "rows-per-file": 0}}, ["rows_per_file must be at least 1"]),
        ({"outputs": {"path": "x.jsonl.gz"}}, ["not packed", "Name 'x.jsonl'"]),
        ({"outputs": {"path": "x.parquet", "format": "jsonl"}}, ["contradict each other"]),
        ({"outputs": {"path": "nosuch://x"}}, ["nosuch://x cannot be used"]),
        (
            {"sampling": {"chat_template_kwargs": {"day": date(2024, 1, 2)}}},
            ["sampling.chat_template_kwargs.day: 2024-01-02 is a date", "Quote"],
        ),
        ({"sampling": {"logit_bias": {5: 1}}}, ["sampling.logit_bias: the name 5", "quote"]),
        ({"inputs": {"path": "no.jsonl"}}, ["there is no file 'no.jsonl'"]),
        ({"sampling": {"temprature": 1}}, ["sampling", "Did you mean temperature?"]),
        ({"sampling": {"temperature": -1}}, ["sampling: temperature"]),
        ({"concurrency": 0}, ["concurrency must be at least 1, got 0"]),
        ({"max-model-len": 0}, ["max_model_len must be at least 1, got 0"]),
        ({"engine-stall-timeout": -1}, ["engine_stall_timeout must be seconds"]),
        ({"inputs": {"path": "a.txt", "column": "a", "template": "{a}"}}, ["exclude each other"]),
        ({"inputs": {"path": "a.txt", "mode": "completion", "system": "x"}}, ["inputs.system"]),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_job_that_makes_no_sense(
    content: dict[str, Any],
    words: list[str],
    dry: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    path = job_file(tmp_path, **content)
    assert main(["run", path, *(["--dry-run"] if dry else [])]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.strip().splitlines()
    for word in words:
        assert word in line
    assert not list(tmp_path.glob("out*")), "nothing is begun"


def test_flags_that_are_missing_or_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cases = {
        "The following arguments are required: JOB.yaml": ["run"],
        "cannot be read": ["run", "no.yaml"],
        "-o/--output-file": ["run-batch", "-i", "x"],
        "Unknown flag --outputfile. Did you mean --output-file?": [
            *("run-batch", "-i", "x", "-o", "y", "--outputfile", "z")
        ],
    }
    for words, argv in cases.items():
        assert main(argv) == 2
        assert words in capsys.readouterr().err
