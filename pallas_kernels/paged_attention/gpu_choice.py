"""Which implementation of paged attention a GPU gets, and why; the device is data.

Knows what each implementation runs on; looks no device up. The kernels' modules are imported when
one is chosen, so that no other platform pays for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import MappingProxyType
from typing import Literal, NamedTuple

from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.api import PagedAttention, PlanAttention
from pallas_kernels.paged_attention.tuning import AttentionShape

GpuBackend = Literal["mosaic_gpu", "triton", "xla"]
BACKENDS: tuple[GpuBackend, ...] = ("mosaic_gpu", "triton", "xla")
"""From the one wanted most to the one that always runs."""
MOSAIC_ROWS = 64  # of a tile of queries
TRITON_DTYPES = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """A GPU as `jax.Device` describes it."""

    compute_capability: str  # "9.0" for NVIDIA; "gfx942" for AMD
    num_cores: int  # `Device.core_count`: streaming multiprocessors or compute units

    @property
    def nvidia(self) -> tuple[int, int] | None:
        """The compute capability in numbers; None for other makers."""
        major, _, minor = self.compute_capability.partition(".")
        return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None

    @property
    def has_fp8(self) -> bool:
        """Whether Triton converts float8_e4m3fn; elsewhere it is given the bits."""
        return self.nvidia is not None and self.nvidia >= (8, 9)


@dataclass(frozen=True, kw_only=True)
class GpuRequest:
    """What attention on a GPU is chosen for.

    `override` is taken without further questions, so that a user has the last word. `rejected`:
    implementations that were tried and failed (check.py), with the reason.
    """

    device: GpuSpec
    shape: AttentionShape  # per device; layers of other shapes are served as well
    override: GpuBackend | Literal["auto"] = "auto"
    rejected: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class GpuChoice(NamedTuple):
    """What was chosen; the reason names what was passed over."""

    backend: GpuBackend
    plan: PlanAttention
    attend: PagedAttention
    reason: str


def refusal(backend: GpuBackend, shape: AttentionShape, device: GpuSpec) -> str | None:
    """Why an implementation serves neither device nor shape; None: it does."""
    return _why_not_on(backend, device) or why_not_for(backend, shape)


def choose_gpu_attention(request: GpuRequest) -> GpuChoice:
    """The first implementation that runs on the device and was not rejected."""
    if request.override != "auto":
        return _make(request.override, request, "asked for")
    passed_over: list[str] = []
    for backend in BACKENDS:
        why_not = request.rejected.get(backend) or refusal(backend, request.shape, request.device)
        if why_not is None:
            return _make(backend, request, "; ".join([_MERITS[backend], *passed_over]))
        passed_over.append(f"not {backend}: {why_not}")
    return _make("xla", request, "; ".join(["nothing else is left", *passed_over]))


_MERITS: Mapping[str, str] = MappingProxyType(
    {
        "mosaic_gpu": "made for compute capability 9.0",
        "triton": "serves NVIDIA from 8.0 and AMD",
        "xla": "runs everywhere, slowly",
    }
)


def _why_not_on(backend: GpuBackend, device: GpuSpec) -> str | None:
    capability = device.nvidia
    if backend == "mosaic_gpu" and capability != (9, 0):
        return f"it needs compute capability 9.0, this is {device.compute_capability}"
    if backend == "triton":
        if capability is not None and capability < (8, 0):
            return f"it needs compute capability 8.0, this is {device.compute_capability}"
        if find_spec("jax.experimental.pallas.triton") is None:
            return "this JAX has no Triton dialect"
    return None


def why_not_for(backend: GpuBackend, shape: AttentionShape) -> str | None:
    """What of a shape an implementation does not cover; None: nothing."""
    size = shape.head_dim
    if backend == "mosaic_gpu":
        if shape.page_dtype not in ("bfloat16", "float16"):
            return f"it has no pages of {shape.page_dtype}"
        if shape.page_dtype != shape.query_dtype:
            return f"its pages are of the queries' type, {shape.query_dtype}"
        if size not in (64, 128, 256):
            return f"it has no head size of {size}"
        if shape.group > MOSAIC_ROWS:
            return f"it has no {shape.group} query heads of a kv head"
        if shape.page_size < 8 or shape.page_size & (shape.page_size - 1):
            return f"it has no pages of {shape.page_size} tokens"
    if backend == "triton":
        if shape.page_dtype not in TRITON_DTYPES:
            return f"it has no pages of {shape.page_dtype}"
        if size < 16 or size & (size - 1) or size > 256:
            return f"it has no head size of {size}"
    return None


def _make(backend: GpuBackend, request: GpuRequest, reason: str) -> GpuChoice:
    if backend == "xla":
        return GpuChoice("xla", xla.plan, xla.paged_attention, f"xla ({reason})")
    from pallas_kernels.paged_attention.gpu import GpuAttention

    op = GpuAttention(dialect=backend, device=request.device, shape=request.shape)
    return GpuChoice(backend, op.plan, op.attend, f"{backend} ({reason})")
