"""`jaxinfer bench ...`: flags and their errors, and a small run of each with the real engine."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.bench.throughput import rates
from jaxinfer.bench.workloads import Workload
from jaxinfer.cli.main import main
from tests.bench.openai_server import KnownServer, running
from tests.cli.small_engine import run_with_small_engine
from tests.e2e.conftest import SMALL_FLAGS
from tests.e2e.tiny_model import write_tiny_model
from tests.quick_xla import QUICK_XLA_FLAGS


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def known_server() -> Iterator[KnownServer]:
    """An OpenAI-style server of another make, in a thread."""
    server, started, stop = KnownServer(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with running(server):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(10)
    yield server
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["bench", *words]) == 2
    return capsys.readouterr().err


def test_rates():
    row = rates(Workload(4, 100, 50), 2.0)
    assert row["output_tok_s"] == 100.0
    assert row["total_tok_s"] == 300.0
    assert (row["n"], row["in"], row["out"]) == (4, 100, 50)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "There are: throughput, latency, serve"),
        (["latancy"], "Did you mean latency?"),
        (["throughput", "--num-runs", "0"], "--num-runs must be at least 1"),
        (["throughput", "--only", "1"], "--workloads peers"),
        (["throughput", "--workloads", "peers", "--only", "6"], "between 0 and 5"),
        (["latency", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["latency", "--num-itres", "1"], "Did you mean --num-iters"),
        (["latency", "--plot", "a.pdf"], ".png"),
        (["serve", "--port", "8000"], "--base-url http://HOST:PORT"),
        (["serve", "--base-url", "http://h:1", "--dtype", "float32"], "--dtype is for a server"),
        (["serve", "--base-url", "h:1"], "must be like http://"),
        (["serve", "--max-concurrency", "1", "0"], "--max-concurrency=0"),
        (["serve", "--base-url", "http://h", "--request-rate", "0"], "--request-rate=0.0"),
        (["serve", "--base-url", "http://h", "--dataset", "sharegpt"], "--dataset-path"),
        (["serve", "--base-url", "http://127.0.0.1:1"], "no server answers there"),
    ],
)
def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str], words: list[str], said: str):
    assert said in refusal(capsys, *words)


def test_json_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    bad = str(tmp_path / "absent" / "a.json")
    error = refusal(capsys, "serve", "--base-url", "http://127.0.0.1:1", "--json", bad)
    assert "cannot be written" in error


def test_serve_measures_any_server(
    known_server: KnownServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "rows.jsonl"
    argv = ["bench", "serve", "--base-url", known_server.url + "/v1", "--num-prompts", "6"]
    argv += ["--max-concurrency", "1", "3", "--num-warmups", "1", "--input-len", "5"]
    assert main([*argv, "--json", str(out), "--ignore-eos"]) == 0
    rows = lines_of(out)
    assert [(row["max_concurrency"], row["num_ok"], row["model"]) for row in rows] == [
        (1, 6, "known"),
        (3, 6, "known"),
    ]
    assert len(known_server.bodies) == 2 * (1 + 6)
    prompts = [tuple(body["prompt"]) for body in known_server.bodies]
    assert len(set(prompts)) == len(prompts), "a prompt seen before may be in the server's cache"
    assert all(body["ignore_eos"] for body in known_server.bodies)
    shown = capsys.readouterr().out
    assert "requests done" in shown
    assert "TTFT p99 (ms)" in shown


def test_serve_shows_failures(
    known_server: KnownServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    known_server.fault, known_server.fault_every = "busy", 2
    argv = ["bench", "serve", "--base-url", known_server.url, "--num-prompts", "6"]
    argv += ["--num-warmups", "0", "--model", "mine"]
    assert main(argv) == 0
    assert "3 x HTTP 429: queue full" in capsys.readouterr().out
    assert {body["model"] for body in known_server.bodies} == {"mine"}
    known_server.fault_every = 1
    assert main(argv) == 1, "nothing was measured"


def test_serve_starts_a_server_of_its_own(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("XLA_FLAGS", QUICK_XLA_FLAGS)  # compiled once for it and the tests in e2e
    out = tmp_path / "rows.jsonl"
    argv = ["bench", "serve", str(tiny_model), *SMALL_FLAGS, "--endpoint", "/v1/chat/completions"]
    argv += ["--num-prompts", "4", "--input-len", "8", "--output-len", "6", "--ignore-eos"]
    argv += ["--request-rate", "100", "--json", str(out)]
    assert main(argv) == 0
    [row] = lines_of(out)
    assert (row["num_ok"], row["num_output_tokens"], row["errors"]) == (4, 24, {})
    assert row["are_tokens_counted_by_server"]
    assert row["ttft_s"]["p50"] > 0
    assert "sent late by" in capsys.readouterr().out


def test_latency_of_a_tiny_model(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "row.json", tmp_path / "latency.png"
    argv = ["bench", "latency", str(tiny_model), *SMALL_FLAGS, "--batch-size", "3"]
    argv += ["--input-len", "8", "--output-len", "5", "--num-iters", "4", "--num-iters-warmup", "1"]
    assert main([*argv, "--json", str(out), "--plot", str(plot)]) == 0
    [row] = lines_of(out)
    counts = {name: row[name]["count"] for name in ("e2e_s", "ttft_s", "itl_s")}
    assert counts == {"e2e_s": 4, "ttft_s": 4 * 3, "itl_s": 4 * 3 * 4}
    assert row["ttft_s"]["max"] + row["itl_s"]["min"] <= row["e2e_s"]["max"]
    assert plot.read_bytes()[1:4] == b"PNG"
    assert "inter-token" in capsys.readouterr().out


def test_a_workload_that_is_too_long(tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    words = ["throughput", str(tiny_model), *SMALL_FLAGS, "--input-len", "250"]
    assert "raise --max-model-len" in refusal(capsys, *words)


@pytest.mark.model
def test_throughput_of_the_model(smollm2_gguf: Path, tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    argv = ["bench", "throughput", str(smollm2_gguf)]
    argv += ["--num-prompts", "2", "--input-len", "8", "--output-len", "4"]
    result = run_with_small_engine(*argv, "--json", str(out))
    assert result.returncode == 0, result.stderr
    [row] = lines_of(out)
    assert (row["n"], row["in"], row["out"]) == (2, 8, 4)
    assert row["output_tok_s"] > 0
    assert row["dtype"] == "float32"
    assert "output_tok_s" in result.stdout
