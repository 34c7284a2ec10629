"""Kernels of a GPU that were tried on it before they are used.

Joins the choice (dispatch.py) and the check (paged_attention/check.py); runs on the default device.
"""

from collections.abc import Callable
from dataclasses import replace

from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.paged_attention.check import CheckReport, check_paged_attention
from pallas_kernels.paged_attention.gpu_choice import GpuRequest

Check = Callable[[KernelSet], CheckReport]


def choose_checked_kernels(request: GpuRequest, *, check: Check | None = None) -> KernelSet:
    """Chooses until an implementation passes its check; `reasons` tell what came of it.

    What was asked for by name is kept whatever the check says, and so is XLA's, the last one:
    then the reasons say that it failed.
    """

    def check_here(kernels: KernelSet) -> CheckReport:
        return check_paged_attention(kernels.plan_attention, kernels.paged_attention, request.shape)

    run_check = check_here if check is None else check
    rejected = dict(request.rejected)
    while True:
        kernels = choose_kernels(platform="gpu", gpu=replace(request, rejected=rejected))
        report = run_check(kernels)
        is_last = request.override != "auto" or kernels.attention_backend == "xla"
        if report.failure is None or is_last:
            return replace(kernels, reasons=(*kernels.reasons, _describe(kernels, report)))
        rejected[kernels.attention_backend] = f"its check failed: {report.failure}"


def _describe(kernels: KernelSet, report: CheckReport) -> str:
    if report.failure is not None:
        result = f"FAILED, and there is nothing to fall back to: {report.failure}"
    else:
        result = f"right, largest error {report.max_error:.2g}"
    return (
        f"check of paged_attention ({kernels.attention_backend}): {result}; {report.seconds:.1f} s"
    )
