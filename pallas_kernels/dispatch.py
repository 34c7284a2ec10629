"""Which implementation of each op runs on a device: chosen once at start-up, with the reason.

The device is data (a platform name), never looked up here, so that programs can be compiled for
devices that are not there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.native.library import NativeKernels
from pallas_kernels.paged_attention import cpu, xla
from pallas_kernels.paged_attention.api import PagedAttention, PlanAttention


@dataclass(frozen=True, kw_only=True)
class KernelSet:
    """One function per op; handed to the layers when they are built."""

    plan_attention: PlanAttention
    paged_attention: PagedAttention
    kv_storage_dtype: Callable[[DTypeLike], jnp.dtype]  # of page arrays that hold a dtype
    reasons: tuple[str, ...]  # one line an op: what was chosen and why


def _as_it_is(dtype: DTypeLike) -> jnp.dtype:
    return jnp.dtype(dtype)


def choose_kernels(*, platform: str, native: NativeKernels | None = None) -> KernelSet:
    """The kernels for a platform ("cpu", "gpu", "tpu"); `native` are a CPU's, if they were asked
    for."""
    reason = f"XLA ops, the only implementation for {platform} so far"
    attention: PagedAttention = xla.paged_attention
    if native is not None and native.is_available:
        reason, attention = native.reason, cpu.make_paged_attention(native)
    elif native is not None:
        reason = f"XLA ops, since the C++ kernel is not to be had: {native.reason}"
    return KernelSet(
        plan_attention=xla.plan,
        paged_attention=attention,
        kv_storage_dtype=xla.storage_dtype if platform == "cpu" else _as_it_is,
        reasons=(f"paged_attention: {reason}",),
    )
