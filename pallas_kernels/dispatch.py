"""Which implementation of each op runs on a device: chosen once at start-up, with the reason.

The device is data (a platform name), never looked up here, so that programs can be compiled for
devices that are not there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.devices import TPUS
from pallas_kernels.matmul.cpu import PanelMatmul, StoredDType
from pallas_kernels.native.library import NativeKernels
from pallas_kernels.paged_attention import cpu, tpu, xla
from pallas_kernels.paged_attention.api import EmptyPages, PagedAttention, PlanAttention
from pallas_kernels.paged_attention.gpu_choice import GpuRequest, choose_gpu_attention
from pallas_kernels.paged_attention.tuning import AttentionShape, TpuBlocks, choose_blocks, refusal


@dataclass(frozen=True, kw_only=True)
class KernelSet:
    """One function per op; handed to the layers when they are built."""

    plan_attention: PlanAttention
    paged_attention: PagedAttention
    kv_storage_dtype: Callable[[DTypeLike], jnp.dtype]  # of page arrays that hold a dtype
    empty_pages: EmptyPages = jnp.zeros
    matmul: PanelMatmul | None  # stores weights for itself; None: XLA's own over plain weights
    reasons: tuple[str, ...]  # one line an op: what was chosen and why; names compiled programs
    verdicts: tuple[str, ...] = ()  # what a device's checks of kernels said (checked.py)
    attention_backend: str = "xla"  # the name by which it is asked for or passed over

    @property
    def pages_are_unmapped(self) -> bool:
        """Whether nothing has touched the memory of new pages yet."""
        return self.empty_pages is not jnp.zeros


def _as_it_is(dtype: DTypeLike) -> jnp.dtype:
    return jnp.dtype(dtype)


def choose_kernels(
    *,
    platform: str,
    native: NativeKernels | None = None,
    stored_weights: StoredDType | None = None,
    device_kind: str = "",
    num_cores: int = 1,
    attention_shape: AttentionShape | None = None,
    attention_backend: str = "auto",
    gpu: GpuRequest | None = None,
) -> KernelSet:
    """The kernels for a platform ("cpu", "gpu", "tpu").

    `device_kind` and `num_cores` are the device's as JAX tells them, `attention_shape` is that of
    the model's layers on one device: kernels that are made for a device and shape need both.
    `native` are a CPU's, if they were asked for. `stored_weights` is the type in which its
    product may store weights; None leaves them as they are, for XLA's product.
    `attention_backend` "xla" passes a CPU's and a TPU's own kernel over; whoever asks for one of
    those by name compares it with the result's.
    `gpu`: the device, the layers' shape and what was asked for; without it a GPU has XLA's.
    """
    if platform == "gpu" and gpu is not None:
        return _choose_for_gpu(gpu)
    backend, reason = "xla", f"XLA ops, the only implementation for {platform} so far"
    attention: PagedAttention = xla.paged_attention
    plan: PlanAttention = xla.plan
    empty_pages: EmptyPages = jnp.zeros
    if attention_backend == "xla":
        reason = "XLA ops, as asked for"
    elif native is not None and native.paged_attention is not None:
        backend, reason = "native", native.paged_attention_reason
        attention = cpu.make_paged_attention(native.paged_attention)
        empty_pages = cpu.make_empty_pages(native.paged_attention)
    elif native is not None:
        reason = f"XLA ops, since the C++ kernel is not to be had: {native.paged_attention_reason}"
    elif platform == "tpu" and attention_shape is not None:
        blocks = _choose_tpu_blocks(device_kind, num_cores, attention_shape)
        if isinstance(blocks, TpuBlocks):
            backend = "pallas_tpu"
            plan = tpu.make_plan(attention_shape, blocks)
            attention = tpu.make_paged_attention(attention_shape, blocks)
            reason = f"Pallas for {device_kind}, {blocks.describe(attention_shape)}"
        else:
            reason = f"XLA ops, since {blocks}"
    matmul, matmul_reason = _choose_matmul(native, stored_weights)
    return KernelSet(
        plan_attention=plan,
        paged_attention=attention,
        kv_storage_dtype=xla.storage_dtype if platform == "cpu" else _as_it_is,
        empty_pages=empty_pages,
        matmul=matmul,
        reasons=(f"paged_attention: {reason}", f"matmul: {matmul_reason}"),
        attention_backend=backend,
    )


def _choose_for_gpu(gpu: GpuRequest) -> KernelSet:
    attention = choose_gpu_attention(gpu)
    return KernelSet(
        plan_attention=attention.plan,
        paged_attention=attention.attend,
        kv_storage_dtype=_as_it_is,
        matmul=None,
        reasons=(f"paged_attention: {attention.reason}", "matmul: XLA's own"),
        attention_backend=attention.backend,
    )


def _choose_matmul(
    native: NativeKernels | None, stored_weights: StoredDType | None
) -> tuple[PanelMatmul | None, str]:
    if native is None or stored_weights is None:
        return None, "XLA's own"
    if native.matmul is None:
        return None, f"XLA's own, since the C++ kernel is not to be had: {native.matmul_reason}"
    matmul = PanelMatmul(
        target=native.matmul.target, panel=native.matmul.panel, dtype=stored_weights
    )
    return matmul, f"{native.matmul_reason}; weights stored as {stored_weights}"


def _choose_tpu_blocks(device_kind: str, num_cores: int, shape: AttentionShape) -> TpuBlocks | str:
    """Block sizes, or why there are none."""
    device = TPUS.get(device_kind)
    if device is None:
        return f"{device_kind!r} is not in the table of pallas_kernels/devices.py"
    refused = refusal(shape)
    if refused is not None:
        return refused
    blocks = choose_blocks(replace(device, num_cores=num_cores), shape)
    if blocks is None:
        return f"two blocks of {shape.page_size}-token pages do not fit the VMEM of {device.name}"
    return blocks
