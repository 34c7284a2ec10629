"""Memory does not grow with the number of lines, neither in a run nor when one is continued."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# 100 bytes a line, held anywhere, would be more than twice this in the small case.
MOST_GROWTH_BYTES = 2 * 2**20


@pytest.mark.parametrize(
    "num_lines", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)], ids="{:,}".format
)
def test_memory_is_bounded(num_lines: int, tmp_path: Path):
    argv = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), str(num_lines)]
    result = subprocess.run(
        [sys.executable, "-m", "tests.batch.big", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["done"], told["again"]) == (num_lines, 0)
    first, *later = told["memory"]
    assert max(later) - first < MOST_GROWTH_BYTES, told["memory"]
