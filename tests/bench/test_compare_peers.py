"""scripts/compare_peers: who runs when, the ratios, holding processes still, the driver."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.bench.workloads import random_prompts
from tests.e2e.conftest import SMALL_FLAGS
from tests.e2e.tiny_model import write_tiny_model

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/compare_peers.py as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_peers  # type: ignore[import-not-found]

    return compare_peers


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose child burns processor time."""
    burn = "while True: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    yield process
    import process_tree  # type: ignore[import-not-found]

    for member in process_tree.members(process.pid):
        member.kill()
    process.wait()


def test_a_tree_that_is_held_still_takes_no_time(script: Any, busy: subprocess.Popen[bytes]):
    tree = script.process_tree
    end_s = time.monotonic() + 20
    while len(tree.members(busy.pid)) < 2 or tree.cpu_s(busy.pid) < 0.2:
        assert time.monotonic() < end_s, "the child does not run"
        time.sleep(0.02)
    assert tree.memory_bytes(busy.pid) > 1e6
    assert tree.peak_rss_bytes(busy.pid) > 1e6
    tree.pause(busy.pid)
    time.sleep(0.05)  # signals are delivered
    assert tree.idle_cpu_share(busy.pid, seconds=0.3) < 0.05
    tree.resume(busy.pid)
    before_s = tree.cpu_s(busy.pid)
    while tree.cpu_s(busy.pid) - before_s < 0.1:
        assert time.monotonic() < end_s, "the child did not go on"
        time.sleep(0.02)


def test_sides_take_turns_with_prompts_of_their_own(script: Any, monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    monkeypatch.setattr(script.process_tree, "resume", lambda pid: log.append(f"go {pid}"))
    monkeypatch.setattr(script.process_tree, "pause", lambda pid: log.append(f"stop {pid}"))

    def side(name: str, pid: int, rate: float) -> Any:
        def run(case: str, seed: int) -> dict[str, float]:
            log.append(f"{name} {case} {seed}")
            return {"output_tok_s": rate * (seed + 1)}

        return script.Side(name=name, pid=pid, run=run, startup_s=1.0)

    sides = [side("ours", 1, 30.0), side("peer", 2, 10.0)]
    turns = [
        turn for number in (0, 1) for turn in script.take_turns(sides, {"a": "A", "b": "B"}, number)
    ]
    runs = [line for line in log if line[0] in "op"]
    assert runs == [
        *("ours A 0", "peer A 0", "ours B 1", "peer B 1"),
        *("peer A 2", "ours A 2", "peer B 3", "ours B 3"),
    ]
    assert log[:6] == ["go 1", "ours A 0", "stop 1", "go 2", "peer A 0", "stop 2"]
    assert script.ratios(turns, "a", "output_tok_s") == [3.0, 3.0]


def test_ratios_are_of_neighbours(script: Any):
    rates = {("ours", 0): 4.0, ("peer", 0): 2.0, ("ours", 1): 9.0, ("peer", 1): 3.0}
    turns = [
        script.Turn(number, "1x1024/1", side, {"all_tok_s": rate, "cpu_s": 1.0})
        for (side, number), rate in rates.items()
    ]
    assert script.ratios(turns, "1x1024/1", "all_tok_s") == [2.0, 3.0]
    assert script.spread([2.0, 3.0, 5.0]) == "3.00 (2.00..5.00)"
    table = script.offline_table(turns, {"1x1024/1": script.Workload(1, 1024, 1)})
    assert "| 1x1024/1 | 6.5 | 2.5 | 2.50 (2.00..3.00) | 1.0 : 1.0 |" in table


def test_the_driver_has_the_same_prompts(script: Any):
    theirs = sys.modules["peer_driver"].make_prompts(3, 20, seed=4, vocab_size=49_000)
    assert theirs == random_prompts(3, 20, vocab_size=49_152, seed=4)


@pytest.mark.slow
def test_ours_against_transformers(tmp_path: Path):
    """All of it, with real engines over a tiny model."""
    pytest.importorskip("torch")
    model = write_tiny_model(tmp_path / "tiny", config={"max_position_embeddings": 2048})
    out = tmp_path / "turns.json"
    pairs = zip(SMALL_FLAGS[::2], SMALL_FLAGS[1::2], strict=True)
    options: dict[str, Any] = {name[2:].replace("-", "_"): int(value) for name, value in pairs}
    options["token_buckets"] = [options["token_buckets"]]
    command = [sys.executable, str(SCRIPTS / "compare_peers.py"), "--peer", "transformers"]
    command += ["--peer-python", sys.executable, "--model", str(model), "--vocab-size", "340"]
    command += ["--only", "0", "--alternations", "2", "--json", str(out)]
    done = subprocess.run(
        [*command, "--options", json.dumps(options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [(turn["alternation"], turn["side"]) for turn in result["turns"]] == [
        *((0, "ours"), (0, "peer"), (1, "peer"), (1, "ours")),
    ]
    for side in ("ours", "peer"):
        assert result["sides"][side]["peak_rss_bytes"] > 50e6
    assert "| 1x16/128 |" in done.stdout
