"""Which attention a GPU gets, and that a wrong or broken kernel is noticed before it is used."""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels.checked import choose_checked_kernels
from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.paged_attention import reference, xla
from pallas_kernels.paged_attention.api import NO_PARAMS
from pallas_kernels.paged_attention.check import CheckReport, check_paged_attention
from pallas_kernels.paged_attention.gpu_choice import GpuRequest, GpuSpec
from pallas_kernels.paged_attention.tuning import AttentionShape

SHAPE = AttentionShape(
    num_kv_heads=1,
    group=2,
    head_dim=64,
    query_dtype="bfloat16",
    page_dtype="bfloat16",
    page_size=16,
)
SMALL = replace(SHAPE, head_dim=16, query_dtype="float32", page_dtype="float32")


def request_for(compute_capability: str, **rest) -> GpuRequest:
    device = GpuSpec(compute_capability=compute_capability, num_cores=4)
    return GpuRequest(device=device, shape=SHAPE, **rest)


@pytest.mark.parametrize(
    ("compute_capability", "backend"),
    [
        ("9.0", "mosaic_gpu"),
        ("8.0", "triton"),
        ("8.9", "triton"),
        ("10.0", "triton"),
        ("12.0", "triton"),
        ("gfx942", "triton"),
        ("7.5", "xla"),
    ],
)
def test_by_capability(compute_capability: str, backend: str):
    kernels = choose_kernels(platform="gpu", gpu=request_for(compute_capability))
    assert kernels.attention_backend == backend
    assert kernels.reasons[0].startswith(f"paged_attention: {backend} (")
    if backend != "mosaic_gpu":
        assert f"needs compute capability 9.0, this is {compute_capability}" in kernels.reasons[0]


def test_the_user_has_the_last_word():
    kernels = choose_kernels(platform="gpu", gpu=request_for("9.0", override="xla"))
    assert kernels.attention_backend == "xla"
    assert kernels.paged_attention is xla.paged_attention


@pytest.mark.parametrize(
    ("compute_capability", "change", "backend", "reason"),
    [
        ("9.0", {"query_dtype": "float32", "page_dtype": "float32"}, "triton", "float32"),
        ("9.0", {"page_dtype": "int8"}, "triton", "not mosaic_gpu: it has no pages of int8"),
        ("9.0", {"page_size": 24}, "triton", "it has no pages of 24 tokens"),
        ("9.0", {"head_dim": 80}, "xla", "not triton: it has no head size of 80"),
        ("8.0", {"page_dtype": "float8_e4m3fn"}, "triton", "capability 9.0"),
        ("gfx942", {"page_dtype": "float8_e4m3fn"}, "triton", "capability 9.0"),
        ("9.0", {"page_dtype": "float8_e4m3fn"}, "triton", "it has no pages of float8_e4m3fn"),
    ],
)
def test_by_shape(compute_capability: str, change: dict, backend: str, reason: str):
    request = replace(request_for(compute_capability), shape=replace(SHAPE, **change))
    kernels = choose_kernels(platform="gpu", gpu=request)
    assert kernels.attention_backend == backend
    assert reason in kernels.reasons[0]


def right(*args) -> tuple[Array, Array]:
    return reference.paged_attention(*args)


def slightly_wrong(*args) -> tuple[Array, Array]:
    out_TKGH, pages_PKBC = reference.paged_attention(*args)
    return out_TKGH.at[3, 0, 1].add(0.01), pages_PKBC


def reads_too_little(q, k, v, pages, batch, spec, params) -> tuple[Array, Array]:
    position_T = jnp.maximum(batch.places.position_T - 1, 0)
    batch = replace(batch, places=batch.places._replace(position_T=position_T))
    return reference.paged_attention(q, k, v, pages, batch, spec, params)


def writes_nothing(q, k, v, pages, batch, spec, params) -> tuple[Array, Array]:
    out_TKGH, _ = reference.paged_attention(q, k, v, pages, batch, spec, params)
    return out_TKGH, pages


def gives_nan(*args) -> tuple[Array, Array]:
    out_TKGH, pages_PKBC = reference.paged_attention(*args)
    return out_TKGH.at[0].set(jnp.nan), pages_PKBC


def does_not_compile(*args) -> tuple[Array, Array]:
    raise NotImplementedError("no such instruction")


@pytest.mark.parametrize(
    ("attend", "failure"),
    [
        (right, None),
        (slightly_wrong, "wrong by 0.01 where 0.002 is allowed"),
        (reads_too_little, "wrong by"),
        (writes_nothing, "wrong by inf"),
        (gives_nan, "wrong by nan"),
        (does_not_compile, "it does not run: NotImplementedError: no such instruction"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_check_notices(attend: Callable[..., tuple[Array, Array]], failure: str | None):
    report = check_paged_attention(reference.plan, attend, SMALL, params=NO_PARAMS)
    if failure is None:
        assert report.failure is None and report.max_error < 1e-5
    else:
        assert report.failure is not None and failure in report.failure


def report(failure: str | None) -> CheckReport:
    return CheckReport(np.nan if failure else 1e-4, failure, 0.5)


def test_falls_back_until_a_check_passes():
    tried: list[str] = []

    def check(kernels: KernelSet) -> CheckReport:
        tried.append(kernels.attention_backend)
        return report("wrong by 3" if kernels.attention_backend == "mosaic_gpu" else None)

    kernels = choose_checked_kernels(request_for("9.0"), check=check)
    assert tried == ["mosaic_gpu", "triton"]
    assert kernels.attention_backend == "triton"
    assert "not mosaic_gpu: its check failed" in kernels.reasons[0]
    assert kernels.verdicts == (
        "check of paged_attention (mosaic_gpu): failed: wrong by 3",
        "check of paged_attention (triton): right, largest error 0.0001",
    )


def test_what_was_asked_for_is_kept_and_its_failure_told():
    kernels = choose_checked_kernels(
        request_for("9.0", override="triton"), check=lambda _: report("wrong by 3")
    )
    assert kernels.attention_backend == "triton"
    (verdict,) = kernels.verdicts
    assert "FAILED" in verdict and "wrong by 3" in verdict


def test_the_real_check_rejects_kernels_that_this_machine_cannot_run():
    """Here is no GPU: Mosaic and Triton do not compile, and XLA's ops are right."""
    kernels = choose_checked_kernels(request_for("9.0"))
    assert kernels.attention_backend == "xla"
    for backend, verdict in zip(("mosaic_gpu", "triton"), kernels.verdicts, strict=True):
        assert f"not {backend}: its check failed" in kernels.reasons[0]
        assert f"({backend}): failed: it does not run" in verdict
