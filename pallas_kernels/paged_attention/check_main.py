"""The check of one implementation in a process of its own: for a parent that sets a time limit.

    python -m pallas_kernels.paged_attention.check_main REQUEST_AS_JSON

A kernel that faults ends its CUDA context, and one that deadlocks waits for ever: both take their
process along, so it had better not be the one that serves. Prints a line of JSON when the device is
there, and one with the report. Imports jax only.
"""

import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import jax

from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.paged_attention.check import CheckReport, check_paged_attention
from pallas_kernels.paged_attention.gpu_choice import GpuBackend, GpuRequest, GpuSpec
from pallas_kernels.paged_attention.tuning import AttentionShape

Choose = Callable[["CheckRequest"], KernelSet]


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What to check."""

    backend: GpuBackend
    device: GpuSpec
    shape: AttentionShape
    limit_s: float  # after which the process ends itself, should its parent be gone

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "CheckRequest":
        fields = json.loads(text)
        parts = {"device": GpuSpec(**fields["device"]), "shape": AttentionShape(**fields["shape"])}
        return cls(**{**fields, **parts})


def choose_asked(request: CheckRequest) -> KernelSet:
    """The implementation that is to be checked."""
    gpu = GpuRequest(device=request.device, shape=request.shape, override=request.backend)
    return choose_kernels(platform="gpu", gpu=gpu)


def main(argv: Sequence[str], *, choose: Choose = choose_asked) -> int:
    """0 when the check came to an end, whatever its verdict."""
    request = CheckRequest.from_json(argv[0])
    signal.alarm(max(1, round(request.limit_s)))  # its default action ends a process stuck in C
    for option in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
        jax.config.update(option, "0")  # a context on each of eight GPUs takes seconds
    _print({"device": jax.devices()[0].device_kind})
    kernels = choose(request)
    report = check_paged_attention(kernels.plan_attention, kernels.paged_attention, request.shape)
    _print({"report": report._asdict()})
    return 0


def read_output(text: str) -> tuple[bool, CheckReport | None]:
    """Whether the device was there, and the report if there was time for one."""
    has_device, report = False, None
    for line in text.splitlines():
        with suppress(ValueError):  # what libraries print is no JSON
            fields = json.loads(line)
            if isinstance(fields, dict):
                has_device |= "device" in fields
                report = CheckReport(**fields["report"]) if "report" in fields else report
    return has_device, report


def _print(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
