"""A job that is killed at any moment and started again loses nothing and does nothing twice.

The processes are real and the kills are SIGKILL; only the answers are made up.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.batch.echo import write_requests

ROOT = Path(__file__).parents[2]
NUM_LINES = 1000
NUM_KILLS = 20

Answers = list[tuple[int, str]]


def jsonl_answers(target: Path) -> Answers:
    records = [json.loads(line) for line in target.read_text().splitlines()]
    texts = [record["response"]["body"]["choices"][0]["text"] for record in records]
    return [(record["line"], text) for record, text in zip(records, texts, strict=True)]


def parquet_answers(target: Path) -> Answers:
    names = sorted(path.name for path in target.iterdir())
    assert not [name for name in names if "segment" in name or "tmp" in name], names
    rows = pyarrow.parquet.read_table(target).to_pylist()
    return [(row["line"], row["text"]) for row in rows]


def text_answers(target: Path) -> Answers:
    records = jsonl_answers(target.with_name("out.txt.jsonl"))
    texts = [text for _, text in sorted(records)]
    assert target.read_text().splitlines() == texts
    return records


@pytest.mark.parametrize(
    ("name", "rows_per_file", "answers"),
    [
        ("out.jsonl", 0, jsonl_answers),
        ("out.parquet", 40, parquet_answers),
        ("out.txt", 0, text_answers),
    ],
)
def test_killed_twenty_times(
    name: str, rows_per_file: int, answers: Callable[[Path], Answers], tmp_path: Path
):
    source, target = write_requests(tmp_path / "in.jsonl", NUM_LINES), tmp_path / name
    argv = [source, target, rows_per_file, NUM_KILLS, 7]
    result = subprocess.run(
        [sys.executable, "-m", "tests.batch.killing", *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["killed"] == NUM_KILLS, "some runs ended by themselves: there are too few lines"
    assert told["torn"] > 0
    assert 0 < told["left"] < NUM_LINES, "the kills came before or after all of the work"
    found = answers(target)
    assert sorted(number for number, _ in found) == list(range(1, NUM_LINES + 1))
    for number, text in found:
        assert text.startswith(f"say {number - 1} x"), number
