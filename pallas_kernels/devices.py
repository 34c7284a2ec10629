"""What is known of each accelerator: sizes and peak rates, as data.

Knows numbers from the makers' data sheets; looks no device up, so that kernels can be shaped and
programs compiled for devices that are not there. Keys are what `jax.Device.device_kind` says.

Sources: the TPU pages of Google Cloud's documentation ("System architecture", one page a
version) for memory, bandwidth and rates; VMEM as Mosaic's own compiler reports it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_GIB = 2**30
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class TpuSpec:
    """One device as JAX counts them: a chip, or one of its two cores on v7x."""

    name: str
    num_cores: int  # TensorCores that share the device's memory and run one program (megacore)
    hbm_bytes: int
    hbm_bytes_per_s: float
    vmem_bytes: int  # of a core
    flops_bf16_per_s: float
    ops_int8_per_s: float | None  # None: no faster than bfloat16
    flops_fp8_per_s: float | None
    mxu_dim: int  # rows and columns of a matrix unit
    dma_latency_s: float = 2e-6  # HBM to VMEM and its completion seen; order of magnitude


TPU_V4 = TpuSpec(
    name="v4",
    num_cores=2,
    hbm_bytes=32 * _GIB,
    hbm_bytes_per_s=1.228e12,
    vmem_bytes=16 * _MIB,
    flops_bf16_per_s=2.75e14,
    ops_int8_per_s=None,
    flops_fp8_per_s=None,
    mxu_dim=128,
)
TPU_V5E = TpuSpec(
    name="v5e",
    num_cores=1,
    hbm_bytes=16 * _GIB,
    hbm_bytes_per_s=8.19e11,
    vmem_bytes=128 * _MIB,
    flops_bf16_per_s=1.97e14,
    ops_int8_per_s=3.94e14,
    flops_fp8_per_s=None,
    mxu_dim=128,
)
TPU_V5P = TpuSpec(
    name="v5p",
    num_cores=2,
    hbm_bytes=95 * _GIB,
    hbm_bytes_per_s=2.765e12,
    vmem_bytes=64 * _MIB,
    flops_bf16_per_s=4.59e14,
    ops_int8_per_s=9.18e14,
    flops_fp8_per_s=None,
    mxu_dim=128,
)
TPU_V6E = TpuSpec(
    name="v6e",
    num_cores=1,
    hbm_bytes=32 * _GIB,
    hbm_bytes_per_s=1.64e12,
    vmem_bytes=128 * _MIB,
    flops_bf16_per_s=9.18e14,
    ops_int8_per_s=1.836e15,
    flops_fp8_per_s=None,
    mxu_dim=256,
)
TPU_V7X = TpuSpec(
    name="v7x",
    num_cores=1,
    hbm_bytes=96 * _GIB,
    hbm_bytes_per_s=3.69e12,
    vmem_bytes=64 * _MIB,
    flops_bf16_per_s=1.1535e15,
    ops_int8_per_s=None,
    flops_fp8_per_s=2.307e15,
    mxu_dim=256,
)

TPUS: Mapping[str, TpuSpec] = MappingProxyType(
    {
        "TPU v4": TPU_V4,
        "TPU v5 lite": TPU_V5E,
        "TPU v5e": TPU_V5E,
        "TPU v5": TPU_V5P,
        "TPU v5p": TPU_V5P,
        "TPU v6 lite": TPU_V6E,
        "TPU v6e": TPU_V6E,
        "TPU7x": TPU_V7X,
    }
)
"""By device kind; the names of a version differ between releases of its driver."""
