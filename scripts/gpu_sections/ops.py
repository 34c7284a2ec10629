"""One of our attention implementations as the sections call it, on a GPU or interpreted."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import choose_kernels
from pallas_kernels.paged_attention.api import PagedAttention, PlanAttention
from pallas_kernels.paged_attention.gpu import GpuAttention
from pallas_kernels.paged_attention.gpu_choice import GpuRequest, GpuSpec, refusal
from pallas_kernels.paged_attention.tuning import AttentionShape


def gpu_spec(options: dict[str, Any]) -> GpuSpec:
    """The device, from what the section `device` found; a rehearsal plays a small Hopper."""
    if options["platform"] == "cpu":
        return GpuSpec(compute_capability="9.0", num_cores=4)
    return GpuSpec(compute_capability=options["compute_capability"], num_cores=options["num_cores"])


def our_attention(
    backend: str, options: dict[str, Any], shape: AttentionShape
) -> tuple[PlanAttention, PagedAttention] | str:
    """The op, or why it is not to be had here."""
    spec = gpu_spec(options)
    assert backend in ("mosaic_gpu", "triton", "xla"), backend
    why_not = refusal(backend, shape, spec)
    if why_not is not None:
        return why_not
    if options["platform"] == "cpu" and backend != "xla":
        interpret = _interpreter(backend)
        if interpret is None:
            return "this JAX has no public simulator of it"
        op = GpuAttention(dialect=backend, device=spec, shape=shape, interpret=interpret)
        return op.plan, op.attend
    request = GpuRequest(device=spec, shape=shape, override=backend)
    kernels = choose_kernels(platform="gpu", gpu=request)
    return kernels.plan_attention, kernels.paged_attention


def _interpreter(backend: str) -> Any:
    if backend == "triton":
        return True
    return plgpu.InterpretGPUParams() if "InterpretGPUParams" in dir(plgpu) else None
