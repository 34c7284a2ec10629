"""Compiles attention alone for a device that is not here, ours and JAX's own, and checks it."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.planner.chips import Chip
from jaxinfer.planner.compile import read_facts
from jaxinfer.planner.topologies import parse_topology
from jaxinfer.planner.traffic import traffic_of
from pallas_kernels.devices import TPUS
from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.paged_attention.api import (
    AttentionParams,
    AttentionSpec,
    StepLayout,
    locate_tokens,
)
from pallas_kernels.paged_attention.gpu_choice import GpuRequest, GpuSpec
from pallas_kernels.paged_attention.tuning import AttentionShape
from target_checks.cases import KernelCase
from target_checks.rows import MIB, Row, counted
from target_checks.steps import devices_of

MakeArray = Callable[[tuple[int, ...], str], Any]


def check_kernel(topology: str, case: KernelCase) -> Row:
    """The op, with its plan."""
    mesh = Mesh(np.array(devices_of(topology)[:1]), ("one",))
    kernels = _kernels(parse_topology(topology).chip, case)
    array = partial(_array, mesh)
    spec = AttentionSpec(scale=case.head_dim**-0.5, window=case.window, soft_cap=case.soft_cap)

    def run(layout: StepLayout, q: Any, k: Any, v: Any, pages: Any, params: Any) -> Any:
        places = locate_tokens(
            layout,
            num_tokens=case.num_tokens,
            num_pages=case.num_pages,
            page_size=case.page_size,
        )
        batch = kernels.plan_attention(layout, places, decode_only=case.decode_only)
        return kernels.paged_attention(q, k, v, pages, batch, spec, params)

    heads, head_dim, tokens = case.num_kv_heads, case.head_dim, case.num_tokens
    pages = (case.num_pages, heads, case.page_size, 2 * head_dim)
    scale = array((heads,), "float32")
    params = AttentionParams(array((heads, case.group), "float32"), scale, scale)
    args = (
        _layout(array, case),
        array((tokens, heads, case.group, head_dim), case.dtype),
        array((tokens, heads, head_dim), case.dtype),
        array((tokens, heads, head_dim), case.dtype),
        array(pages, case.page_dtype),
        params if case.has_scales else AttentionParams(),
    )
    name = f"{topology} | {kernels.attention_backend} | {case.name}"
    item = jnp.dtype(case.page_dtype).itemsize
    # On a GPU XLA writes the step's rows, which are read and written for that.
    rows = 0 if ":" in topology else 2 * tokens * heads * 2 * head_dim * item
    cache_bytes = int(np.prod(pages)) * item
    return _compiled(mesh, name, run, args, pages=pages, cache_bytes=cache_bytes, rows=rows)


def check_jax_kernel(topology: str) -> Row:
    """JAX's own, which only reads the cache, for the sizes of "H128 bfloat16"."""
    mesh = Mesh(np.array(devices_of(topology)[:1]), ("one",))
    is_tpu = ":" in topology
    run, args = (_jax_on_tpu if is_tpu else _jax_on_gpu)(partial(_array, mesh))
    name = f"{topology} | JAX's own | H128 bfloat16" + ("" if is_tpu else ", decodes")
    return _compiled(mesh, name, run, args, pages=args[1].shape, cache_bytes=0)


def _jax_on_tpu(array: MakeArray) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    run = partial(
        ragged_paged_attention,
        sm_scale=128**-0.5,
        sliding_window=1024,
        num_kv_pages_per_block=16,
        num_queries_per_block=32,
        vmem_limit_bytes=64 * MIB,
    )
    return run, (
        array((512, 16, 128), "bfloat16"),
        array((2048, 32, 8, 128), "bfloat16"),
        array((64,), "int32"),
        array((64, 512), "int32"),
        array((65,), "int32"),
        array((1,), "int32"),
    )


def _jax_on_gpu(array: MakeArray) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """It is for decodes, and knows no window."""
    pages = array((4, 2048, 32, 128), "bfloat16")
    return paged_attention, (
        array((64, 16, 128), "bfloat16"),
        pages,
        pages,
        array((64, 512), "int32"),
        array((64,), "int32"),
    )


def _kernels(chip: Chip, case: KernelCase) -> KernelSet:
    shape = AttentionShape(
        num_kv_heads=case.num_kv_heads,
        group=case.group,
        head_dim=case.head_dim,
        query_dtype=case.dtype,
        page_dtype=case.page_dtype,
        page_size=case.page_size,
    )
    if chip.gpu is None:
        return choose_kernels(
            platform="tpu",
            device_kind=chip.device_kind,
            num_cores=TPUS[chip.device_kind].num_cores,
            attention_shape=shape,
        )
    device = GpuSpec(compute_capability=chip.gpu.compute_capability, num_cores=chip.gpu.num_cores)
    return choose_kernels(platform="gpu", gpu=GpuRequest(device=device, shape=shape))


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: str) -> Any:
    """Stands for an array, which types do not know."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)


def _layout(array: MakeArray, case: KernelCase) -> StepLayout:
    return StepLayout(
        slots_S=array((case.num_seqs,), "int32"),
        starts_S=array((case.num_seqs,), "int32"),
        query_starts_S1=array((case.num_seqs + 1,), "int32"),
        num_seqs=array((), "int32"),
        num_decodes=array((), "int32"),
        page_table_RM=array((case.num_seqs, case.num_columns), "int32"),
    )


def _compiled(
    mesh: Mesh,
    name: str,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    pages: tuple[int, ...],
    cache_bytes: int,
    rows: int = 0,
) -> Row:
    """`cache_bytes` must be changed in place; 0: the op does not write. `rows`: the bytes of pages
    that XLA may move."""
    start_s = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(run, donate_argnums=(4,) if cache_bytes else ()).lower(*args)
        traced_s = time.perf_counter()
        compiled = lowered.compile()
    done_s = time.perf_counter()
    text = compiled.as_text() or ""
    traffic = traffic_of(text, pages=pages)
    facts = read_facts(
        compiled,
        text,
        moved_bytes=traffic.num_bytes,
        trace_s=traced_s - start_s,
        compile_s=done_s - traced_s,
    )
    problems = []
    if traffic.page_bytes > rows:
        problems.append(f"{traffic.page_bytes / MIB:.0f} MiB of pages moved beside the kernel")
    if facts.alias_bytes < cache_bytes:
        problems.append("the cache is not changed in place")
    if cache_bytes and facts.temp_bytes >= cache_bytes:
        problems.append("temporaries as large as the cache")
    return Row(
        name=name,
        num_args=facts.num_args,
        argument_mib=facts.argument_bytes / MIB,
        alias_mib=facts.alias_bytes / MIB,
        temp_mib=facts.temp_bytes / MIB,
        code_mib=facts.code_bytes / MIB,
        moved_mib=traffic.num_bytes / MIB,
        ideal_mib=0.0,
        always=counted(facts.collectives),
        in_branches={},
        trace_s=facts.trace_s,
        compile_s=facts.compile_s,
        problems=tuple(problems),
    )
