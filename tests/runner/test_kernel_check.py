"""A GPU's kernels are tried in a child process: whatever it does, the engine starts and says why.

The children are real processes; only the kernels that they would run need a GPU.
"""

import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer.runner.kernel_check import ChildCheck
from pallas_kernels.checked import choose_checked_kernels
from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.paged_attention.gpu_choice import GpuRequest, GpuSpec
from pallas_kernels.paged_attention.tuning import AttentionShape

REQUEST = GpuRequest(
    device=GpuSpec(compute_capability="9.0", num_cores=4),
    shape=AttentionShape(
        num_kv_heads=1,
        group=2,
        head_dim=64,
        query_dtype="bfloat16",
        page_dtype="bfloat16",
        page_size=16,
    ),
)
MOSAIC = choose_kernels(platform="gpu", gpu=REQUEST)


def check_that(behaviour: str, directory: Path | None, **changes) -> ChildCheck:
    """A check whose child behaves so (check_child.py)."""
    script = Path(__file__).with_name("check_child.py")
    check = ChildCheck(
        request=REQUEST,
        identity="this version",
        directory=directory,
        command=(sys.executable, str(script), behaviour),
    )
    return replace(check, **changes)


def test_a_kernel_that_hangs_costs_the_time_limit_and_no_more(tmp_path: Path):
    report = check_that("hang", tmp_path, limit_s=2.0)(MOSAIC)
    assert report.failure == "the check did not end within 2 s"
    assert math.isnan(report.max_error)
    assert report.seconds < 60


def test_a_kernel_that_faults_is_named_with_its_last_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        report = check_that("fault", tmp_path)(MOSAIC)
    assert report.failure == "the check ended by SIGABRT: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert "kernel mosaic_gpu failed its check" in caplog.text


@pytest.mark.slow
def test_a_wrong_answer_comes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    report = check_that("wrong", tmp_path)(MOSAIC)
    assert report.failure is not None and report.failure.startswith("wrong by")


def test_a_verdict_is_kept_and_the_next_start_asks_nobody(tmp_path: Path):
    first = check_that("right", tmp_path)(MOSAIC)
    assert first.failure is None
    again = check_that("fault", tmp_path)(MOSAIC)  # would fail if it ran
    assert again == first
    for changed in (
        {"identity": "a newer version"},
        {"request": replace(REQUEST, shape=replace(REQUEST.shape, head_dim=128))},
        {"directory": None},
    ):
        check = replace(check_that("fault", tmp_path), **changed)
        assert check(MOSAIC).failure is not None


def test_a_failure_is_kept_too(tmp_path: Path):
    first = check_that("fault", tmp_path)(MOSAIC)
    assert check_that("right", tmp_path)(MOSAIC).failure == first.failure


def test_a_kept_verdict_that_is_damaged_is_found_again(tmp_path: Path):
    check_that("right", tmp_path)(MOSAIC)
    (file,) = tmp_path.iterdir()
    file.write_text('{"report": {"max_error"')
    assert check_that("right", tmp_path)(MOSAIC).failure is None
    assert check_that("fault", tmp_path)(MOSAIC).failure is None  # repaired


def test_a_device_that_is_busy_says_nothing_of_the_kernel(tmp_path: Path):
    report = check_that("no device", tmp_path)(MOSAIC)
    assert report.failure is not None
    assert "found no device, ended with code 1: all CUDA-capable devices are busy" in report.failure
    assert list(tmp_path.iterdir()) == []
    assert check_that("right", tmp_path)(MOSAIC).failure is None


def test_the_engine_falls_back_with_the_reason(tmp_path: Path):
    """Mosaic's check ends by a signal, Triton's is right."""

    def check(kernels: KernelSet):
        is_mosaic = kernels.attention_backend == "mosaic_gpu"
        return check_that("fault" if is_mosaic else "right", tmp_path)(kernels)

    kernels = choose_checked_kernels(REQUEST, check=check)
    assert kernels.attention_backend == "triton"
    assert "not mosaic_gpu: its check failed" in kernels.reasons[0]
    assert "(mosaic_gpu): failed: the check ended by SIGABRT" in kernels.verdicts[0]
    again = choose_checked_kernels(REQUEST, check=check_that("hang", tmp_path, limit_s=1.0))
    assert again.verdicts == kernels.verdicts
    assert again.reasons == kernels.reasons
