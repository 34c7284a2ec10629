"""`jaxinfer bench throughput`: the prompts, the arithmetic, and a small run of the real engine."""

import json
import random
from pathlib import Path

import pytest

from jaxinfer.cli.bench import PEERS, Workload, _random_prompts, _row
from jaxinfer.cli.main import main
from tests.cli.small_engine import SMALL_ENGINE


def test_prompts_are_those_other_engines_get():
    rng = random.Random(0)
    expected = [[rng.randrange(100, 49000) for _ in range(16)] for _ in range(4)]
    assert _random_prompts(Workload(4, 16, 1), vocab_size=49152, seed=0) == expected


def test_prompts_fit_a_small_vocabulary():
    for vocab_size in (1, 50, 101, 500):
        prompts = _random_prompts(Workload(2, 50, 1), vocab_size=vocab_size, seed=0)
        assert all(0 <= token < vocab_size for prompt in prompts for token in prompt)


def test_rates():
    row = _row(Workload(4, 100, 50), 2.0)
    assert row["output_tok_s"] == 100.0
    assert row["total_tok_s"] == 300.0
    assert (row["n"], row["in"], row["out"]) == (4, 100, 50)


def test_peers_list():
    assert PEERS[0] == (1, 16, 128)
    assert len(set(PEERS)) == 6


@pytest.mark.model
def test_a_small_run(smollm2_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "rows.jsonl"
    argv = ["bench", "throughput", str(smollm2_gguf), *SMALL_ENGINE]
    argv += ["--num-prompts", "2", "--input-len", "8", "--output-len", "4"]
    assert main([*argv, "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 1
    assert (rows[0]["n"], rows[0]["in"], rows[0]["out"]) == (2, 8, 4)
    assert rows[0]["output_tok_s"] > 0
    assert rows[0]["dtype"] == "float32"
    assert "output_tok_s" in capsys.readouterr().out
