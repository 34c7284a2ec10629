"""scripts/gpu_check: sections that misbehave, what is counted, and a rehearsal without a GPU."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
CPU = {"platform": "cpu"}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of scripts/gpu_sections that import no JAX."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for gpu_section.py
    from gpu_sections import grid, parent, plan, tables  # type: ignore[import-not-found]

    class Parts:
        Section, SECTIONS = plan.Section, plan.SECTIONS
        run_section, run_together, Limits = parent.run_section, parent.run_together, parent.Limits
        points, Point, table_of = grid.points, grid.Point, tables.table_of

    return Parts


@pytest.fixture
def section(parts: Any) -> Callable[..., Any]:
    def make(behaviour: str, *, limit_s: float = 30.0) -> Any:
        return parts.Section(
            name=behaviour,
            module="gpu_section",
            limit_s=limit_s,
            options={"behaviour": behaviour},
        )

    return make


def limits(parts: Any, *, left_s: float = 60.0) -> Any:
    now_s = time.monotonic()
    return parts.Limits(start_s=now_s, end_s=now_s + left_s)


def test_a_section_that_ends_well(parts: Any, section: Callable[..., Any], capsys):
    result = parts.run_section(section("well"), CPU, limits(parts))
    assert result.error is None
    assert result.rows == [
        {"what": "first", "is_rehearsal": True, "has_an_hour": False},
        {"what": "last"},
    ]
    assert "well: what=last" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("fault", "ended by SIGSEGV: a compiler says something"),
        ("raise", "ValueError: no such instruction"),
    ],
)
def test_what_was_said_before_a_fault_is_kept(
    parts: Any, section: Callable[..., Any], behaviour: str, error: str
):
    result = parts.run_section(section(behaviour), CPU, limits(parts))
    assert error in result.error
    assert [row["what"] for row in result.rows] == ["first"]


def test_a_section_that_hangs_costs_its_limit_and_the_others_go_on(
    parts: Any, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    from gpu_sections import parent  # type: ignore[import-not-found]

    monkeypatch.setattr(parent, "_GRACE_S", 0.5)
    hanging, well = parts.run_together(
        [section("hang", limit_s=9.0), section("well")], CPU, limits(parts)
    )
    assert "ended at its limit of 9 s" in hanging.error
    assert [row["what"] for row in hanging.rows] == ["first"]
    assert well.error is None


def test_without_time_a_section_is_skipped_with_a_word(parts: Any, section: Callable[..., Any]):
    result = parts.run_section(section("well"), CPU, limits(parts, left_s=3.0))
    assert result.error.startswith("skipped: 3 s of the budget") or "2 s" in result.error
    assert result.rows == []


def test_the_sections_fit_the_promise(parts: Any):
    """Every path is there, and those that nothing depends on come last."""
    names = [section.name for section in parts.SECTIONS]
    assert names[0] == "device" and len(set(names)) == len(names)
    for backend in ("mosaic_gpu", "triton", "xla"):
        assert f"attention {backend}" in names
        assert any(name.startswith(f"numerics {backend}") for name in names)
    assert {"attention cudnn", "attention jax_paged", "engine"} <= set(names)


def test_bytes_and_operations_of_a_point(parts: Any):
    decode = parts.Point(batch=16, context=4095)
    assert decode.kv_bytes == 16 * 4096 * 8 * (128 + 128) * 2
    assert decode.bytes_moved == decode.kv_bytes + 2 * 16 * 32 * 128 * 2
    chunk = parts.Point(batch=1, context=0, chunk=4)
    assert chunk.flops == 32 * (1 + 2 + 3 + 4) * 2 * 2 * 128  # heads, keys seen, two products
    later = parts.Point(batch=1, context=10, chunk=1)
    assert later.flops == 32 * 11 * 2 * 2 * 128


def test_the_grid_is_the_issues(parts: Any):
    points = parts.points(is_tiny=False)
    assert len(points) == len(set(points))
    decodes = [point for point in points if point.is_decode]
    assert {1, 16, 64, 256} == {point.batch for point in decodes}
    assert {512, 4096, 32768} == {point.context for point in decodes}
    assert {64, 128} == {point.head_dim for point in points}
    assert {16, 32, 64} == {point.page_size for point in points}
    assert (points[0].batch, points[0].context) == (16, 4096)  # the goals come first
    assert any(point.chunk == 8192 for point in points[:3])


def test_a_table_says_what_is_missing(parts: Any):
    point = {"batch": 1, "context": 2, "chunk": 1, "head_dim": 64, "page_size": 16}
    document = {
        "device": {"kind": "NVIDIA H100", "jax": "0.11.2"},
        "is_rehearsal": False,
        "python": "3.12.3",
        "date": "2026-01-01",
        "total_s": 400.0,
        "budget_s": 460.0,
        "sections": [
            {"name": "device", "seconds": 9.0, "error": None, "rows": [
                {"name": "copy_bytes_per_s", "value": 3e12},
                {"name": "matmul_flops_per_s", "value": 7e14}]},
            {"name": "attention triton", "seconds": 20.0, "error": "ended by SIGSEGV", "rows": [
                {"backend": "triton", **point, "us": 12.34, "share_of_copy": 0.8}]},
            {"name": "attention cudnn", "seconds": 20.0, "error": None, "rows": [
                {"backend": "cudnn", **point, "skipped": "it knows no pages"}]},
        ],
    }  # fmt: skip
    text = parts.table_of(document)
    assert "Copies 3000 GB/s (read + written), matrix products 700.0 TFLOP/s" in text
    assert "| attention triton | 20 | 1 | ended by SIGSEGV |" in text
    assert "| 1 | 2 | 1 | 64 | 16 | 12.3 (80%) | - |" in text
    assert "REHEARSAL" not in text


def rehearse(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    path = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu_check.py"), "--platform", "cpu"]
        + ["--json", str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads(path.read_text())


def test_a_rehearsal_of_the_cheap_part(tmp_path: Path):
    """The device, and an implementation that only newer versions of JAX can simulate."""
    done, document = rehearse(tmp_path, "--only", "attention mosaic_gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A REHEARSAL on a CPU" in done.stdout
    device, attention = document["sections"]
    rates = {row["name"]: row["value"] for row in device["rows"] if "value" in row}
    assert rates["copy_bytes_per_s"] > 0 and rates["matmul_flops_per_s"] > 0
    assert attention["error"] is None and len(attention["rows"]) == 2
    assert document["is_rehearsal"] and document["device"]["platform"] == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["numerics triton H64", "attention triton", "attention cudnn", "attention xla", "engine"],
)
def test_a_rehearsal_of_the_rest(tmp_path: Path, name: str):
    done, document = rehearse(tmp_path, "--only", name)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = document["sections"][1]["rows"]
    assert rows and not any("skipped" in row or row.get("failure") for row in rows)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU may be here")
def test_without_a_gpu_nothing_is_claimed_and_nothing_installed(tmp_path: Path):
    for command in ([str(SCRIPTS / "gpu_check")], [sys.executable, str(SCRIPTS / "gpu_check.py")]):
        path = tmp_path / "found.json"
        done = subprocess.run(
            [*command, "--json", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].endswith("nothing was measured, nothing is claimed.")
        assert not path.exists()
