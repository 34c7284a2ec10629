"""Kernels of a GPU that were tried on it before they are used.

Joins the choice (dispatch.py) and the check (paged_attention/check.py), which runs on the default
device of this process unless another is given: one in a process of its own survives a kernel that
hangs or faults (paged_attention/check_main.py).
"""

from collections.abc import Callable
from dataclasses import replace

from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.paged_attention.check import CheckReport, check_paged_attention
from pallas_kernels.paged_attention.gpu_choice import GpuRequest

Check = Callable[[KernelSet], CheckReport]


def choose_checked_kernels(request: GpuRequest, *, check: Check | None = None) -> KernelSet:
    """Chooses until an implementation passes its check; `reasons` tell what came of it.

    What was asked for by name is kept whatever the check says: then the reasons say that it failed.
    XLA's, the last one, is not checked: there is nothing to fall back to.
    """

    def check_here(kernels: KernelSet) -> CheckReport:
        return check_paged_attention(kernels.plan_attention, kernels.paged_attention, request.shape)

    run_check = check_here if check is None else check
    rejected = dict(request.rejected)
    while True:
        kernels = choose_kernels(platform="gpu", gpu=replace(request, rejected=rejected))
        if kernels.attention_backend == "xla":
            return kernels
        report = run_check(kernels)
        if report.failure is None or request.override != "auto":
            return replace(kernels, reasons=(*kernels.reasons, _describe(kernels, report)))
        rejected[kernels.attention_backend] = f"its check failed: {report.failure}"


def _describe(kernels: KernelSet, report: CheckReport) -> str:
    if report.failure is not None:
        result = f"FAILED, and is used because it was asked for: {report.failure}"
    else:
        result = f"right, largest error {report.max_error:.2g}"
    # No seconds: the reasons name compiled programs.
    return f"check of paged_attention ({kernels.attention_backend}): {result}"
