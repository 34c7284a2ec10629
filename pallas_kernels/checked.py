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
    """Chooses until an implementation passes its check; `verdicts` tell what came of each.

    What was asked for by name is kept whatever the check says: then its verdict is that it failed.
    XLA's, the last one, is not checked: there is nothing to fall back to. Numbers that a check
    measured stand in no reason: reasons name programs, which may have been compiled elsewhere.
    """

    def check_here(kernels: KernelSet) -> CheckReport:
        return check_paged_attention(kernels.plan_attention, kernels.paged_attention, request.shape)

    run_check = check_here if check is None else check
    rejected = dict(request.rejected)
    verdicts: list[str] = []
    while True:
        kernels = choose_kernels(platform="gpu", gpu=replace(request, rejected=rejected))
        if kernels.attention_backend == "xla":
            return replace(kernels, verdicts=tuple(verdicts))
        report = run_check(kernels)
        is_taken = report.failure is None or request.override != "auto"
        verdicts.append(_describe(kernels, report, is_taken=is_taken))
        if is_taken:
            return replace(kernels, verdicts=tuple(verdicts))
        rejected[kernels.attention_backend] = "its check failed"


def _describe(kernels: KernelSet, report: CheckReport, *, is_taken: bool) -> str:
    if report.failure is None:
        result = f"right, largest error {report.max_error:.2g}"
    elif is_taken:
        result = f"FAILED, and is used because it was asked for: {report.failure}"
    else:
        result = f"failed: {report.failure}"
    return f"check of paged_attention ({kernels.attention_backend}): {result}"
