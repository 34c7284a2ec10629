"""What is known of the accelerators that are planned for: one record of data each.

Knows numbers from data sheets and what the compilers say; imports no JAX and looks no device up.
A *device* is what JAX counts: a GPU, a TPU chip, or one of the two halves of a TPU7x chip. (v4 is
not here: its compiler halves the chip where JAX on the hardware does not.)

Sources: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x" (bidirectional ICI bandwidth
of a chip; half of it is taken for one direction); NVIDIA's data sheets of A100 80GB SXM, H100 SXM,
H200 SXM and B200 (dense rates, NVLink total; half of it is one direction). `usable_bytes` of a TPU
is the limit that libtpu's compiler enforces (it names it when a program is larger).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from jaxinfer.runner.memory import GPU_MEMORY_FRACTION
from pallas_kernels.devices import TPU_V5E, TPU_V5P, TPU_V6E, TPU_V7X, TpuSpec

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class GpuArchitecture:
    """What the CUDA compiler must know of a GPU that is not there."""

    major: int  # compute capability
    minor: int
    has_own_features: bool  # sm_90a, sm_100a: instructions of this generation only
    num_cores: int  # streaming multiprocessors
    shared_memory_per_core: int  # bytes
    shared_memory_per_block: int  # bytes, the most a kernel may ask for
    l2_bytes: int
    clock_ghz: float

    @property
    def compute_capability(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True, kw_only=True)
class ChipRates:
    """What one device can do at best."""

    bytes_per_s: float  # memory bandwidth
    flops_bf16_per_s: float
    ring_bytes_per_s: float  # to the next device of a ring, one direction


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator; bytes are those of one device."""

    name: str  # as topologies are written: "v6e", "h100"
    platform: Literal["tpu", "gpu", "cpu"]
    device_kind: str  # what `jax.Device.device_kind` says
    devices_per_chip: int
    usable_bytes: int  # what programs and arrays may have of its memory
    usable_reason: str
    rates: ChipRates | None = None  # None: not known
    gpu: GpuArchitecture | None = None


def _tpu(
    name: str,
    device_kind: str,
    spec: TpuSpec,
    *,
    usable_gib: float,
    ici_bytes_per_s: float,
    num_links: int,
    devices_per_chip: int = 1,
) -> Chip:
    """`ici_bytes_per_s` is the data sheet's: of a chip's links, both directions together.

    A ring through a slice uses two links of a chip, whose halves add up before it.
    """
    return Chip(
        name=name,
        platform="tpu",
        device_kind=device_kind,
        devices_per_chip=devices_per_chip,
        usable_bytes=int(usable_gib * _GIB),
        usable_reason="the compiler's own limit",
        rates=ChipRates(
            bytes_per_s=spec.hbm_bytes_per_s,
            flops_bf16_per_s=spec.flops_bf16_per_s,
            ring_bytes_per_s=ici_bytes_per_s / 2 * 2 / num_links,
        ),
    )


def _gpu(
    name: str,
    device_kind: str,
    architecture: GpuArchitecture,
    *,
    memory_bytes: int,
    bytes_per_s: float,
    flops_bf16_per_s: float,
    nvlink_bytes_per_s: float,
) -> Chip:
    return Chip(
        name=name,
        platform="gpu",
        device_kind=device_kind,
        devices_per_chip=1,
        usable_bytes=int(memory_bytes * GPU_MEMORY_FRACTION),
        usable_reason=f"`serve` has XLA take {GPU_MEMORY_FRACTION:.0%} of it "
        "(XLA_PYTHON_CLIENT_MEM_FRACTION changes that)",
        rates=ChipRates(
            bytes_per_s=bytes_per_s,
            flops_bf16_per_s=flops_bf16_per_s,
            ring_bytes_per_s=nvlink_bytes_per_s / 2,  # through a switch: all links
        ),
        gpu=architecture,
    )


_AMPERE = GpuArchitecture(
    major=8,
    minor=0,
    has_own_features=False,
    num_cores=108,
    shared_memory_per_core=167936,
    shared_memory_per_block=166912,
    l2_bytes=40 * 2**20,
    clock_ghz=1.41,
)
_HOPPER = GpuArchitecture(
    major=9,
    minor=0,
    has_own_features=True,
    num_cores=132,
    shared_memory_per_core=233472,
    shared_memory_per_block=232448,
    l2_bytes=50 * 2**20,
    clock_ghz=1.98,
)
_BLACKWELL = GpuArchitecture(
    major=10,
    minor=0,
    has_own_features=True,
    num_cores=148,
    shared_memory_per_core=233472,
    shared_memory_per_block=232448,
    l2_bytes=126 * 2**20,
    clock_ghz=1.965,
)

_ALL = (
    _tpu("v5e", "TPU v5 lite", TPU_V5E, usable_gib=15.75, ici_bytes_per_s=4e11, num_links=4),
    _tpu("v5p", "TPU v5", TPU_V5P, usable_gib=95.74, ici_bytes_per_s=1.2e12, num_links=6),
    _tpu("v6e", "TPU v6 lite", TPU_V6E, usable_gib=31.25, ici_bytes_per_s=8e11, num_links=4),
    _tpu(
        "tpu7x",
        "TPU7x",
        TPU_V7X,
        usable_gib=94.75,
        ici_bytes_per_s=1.2e12,
        num_links=6,
        devices_per_chip=2,
    ),
    _gpu(
        "a100-80g",
        "NVIDIA A100-SXM4-80GB",
        _AMPERE,
        memory_bytes=85_899_345_920,
        bytes_per_s=2.039e12,
        flops_bf16_per_s=3.12e14,
        nvlink_bytes_per_s=6e11,
    ),
    _gpu(
        "h100",
        "NVIDIA H100 80GB HBM3",
        _HOPPER,
        memory_bytes=85_520_809_984,
        bytes_per_s=3.35e12,
        flops_bf16_per_s=9.89e14,
        nvlink_bytes_per_s=9e11,
    ),
    _gpu(
        "h200",
        "NVIDIA H200",
        _HOPPER,
        memory_bytes=150_754_820_096,
        bytes_per_s=4.8e12,
        flops_bf16_per_s=9.89e14,
        nvlink_bytes_per_s=9e11,
    ),
    _gpu(
        "b200",
        "NVIDIA B200",
        _BLACKWELL,
        memory_bytes=191_514_017_792,
        bytes_per_s=7.7e12,
        flops_bf16_per_s=2.25e15,
        nvlink_bytes_per_s=1.8e12,
    ),
)

CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in _ALL})
"""By the name that topologies begin with."""


def cpu_chip(memory_bytes: int) -> Chip:
    """This machine's processor, or its share of one virtual device."""
    return Chip(
        name="cpu",
        platform="cpu",
        device_kind="cpu",
        devices_per_chip=1,
        usable_bytes=memory_bytes,
        usable_reason="what is available now",
    )
