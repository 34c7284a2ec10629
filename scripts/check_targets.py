"""Compiles the TPU kernels and whole engine steps for TPUs that are not here, and checks them.

    .venv/bin/python scripts/check_targets.py kernels [--topology v6e:2x2 ...] [--json FILE]
    .venv/bin/python scripts/check_targets.py steps [--topology v6e:2x2] [--json FILE]

Needs libtpu, the TPU's compiler (`pip install --no-deps libtpu==0.0.42` beside JAX 0.10.2), and no
TPU. A row is a program: seconds to trace and to compile, MiB that outputs share with inputs
(`alias`), of temporaries (`temp`) and of code, the collectives in it. It fails unless outputs share
the whole cache, no operation copies a layer's part of it, and temporaries are smaller than that.
`kernels` has rows of JAX's own ragged paged attention, which does not write the cache, for
comparison.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported, like the next
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would ask its cloud which TPU this is

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.core.limits import EngineLimits
from jaxinfer.models.registry import define_model
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.runner.abstract import AbstractArrays, abstract_arrays, make_abstract
from jaxinfer.runner.buckets import Bucket
from jaxinfer.runner.packing import num_words
from jaxinfer.runner.step_fn import make_step
from pallas_kernels.devices import TPUS
from pallas_kernels.dispatch import choose_kernels
from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.api import (
    AttentionParams,
    AttentionSpec,
    StepLayout,
    locate_tokens,
)
from pallas_kernels.paged_attention.tuning import AttentionShape, choose_blocks

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
MIB = 2**20
HEADER = (
    "| topology | program | trace s | compile s | cache MiB | alias | temp | code | bytes MiB "
    "| collectives | |\n" + "| --- " * 11 + "|"
)
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a compiled program says of itself; bytes and FLOPs are those of one device."""

    topology: str
    program: str
    trace_s: float
    compile_s: float
    cache_mib: float
    alias_mib: float
    temp_mib: float
    code_mib: float
    bytes_accessed: float
    flops: float
    collectives: str
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """An attention layer on one device, and a step."""

    name: str
    shape: AttentionShape
    decode_only: bool = False
    window: int | None = None
    soft_cap: float | None = None
    has_params: bool = False
    num_tokens: int = 512
    num_seqs: int = 64
    num_columns: int = 512  # of the page table
    num_pages: int = 2048


def kernel_cases() -> Iterator[KernelCase]:
    """Head sizes and dtypes, with all features for the quantized ones; a table of 8 MiB."""
    base = AttentionShape(
        num_kv_heads=8,
        group=4,
        head_dim=128,
        query_dtype="bfloat16",
        page_dtype="bfloat16",
        page_size=32,
    )
    for head_dim, dtype in product((64, 128, 256), ("bfloat16", "int8", "float8_e4m3fn")):
        shape = replace(base, head_dim=head_dim, page_dtype=dtype, num_kv_heads=512 // head_dim)
        yield KernelCase(
            name=f"H{head_dim} {dtype}", shape=shape, has_params=dtype != "bfloat16", window=1024
        )
    yield KernelCase(
        name="H128 float32",
        shape=replace(base, query_dtype="float32", page_dtype="float32", num_kv_heads=2),
        soft_cap=30.0,
    )
    yield KernelCase(name="MHA", shape=replace(base, num_kv_heads=32, group=1), num_pages=512)
    yield KernelCase(
        name="MQA, page 16", shape=replace(base, num_kv_heads=1, group=8, page_size=16)
    )
    yield KernelCase(
        name="decodes, 256 x 128k", shape=replace(base, num_kv_heads=2, page_size=16),
        decode_only=True, num_seqs=256, num_columns=8192, num_pages=16384,
    )  # fmt: skip
    yield KernelCase(
        name="mixed, 256 x 128k", shape=replace(base, num_kv_heads=2, page_size=16),
        num_tokens=2048, num_seqs=256, num_columns=8192, num_pages=16384,
    )  # fmt: skip


class Here:
    """A device of a topology, and arrays that will be on it."""

    def __init__(self, topology: str) -> None:
        self.devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        self.topology = topology
        self.mesh = Mesh(np.array(self.devices[:1]), ("one",))

    def array(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Stands for an array, which types do not know."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)


def check(
    topology: str,
    program: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    donate: tuple[int, ...],
    layer: tuple[int, ...],
    layer_dtype: str,
    num_layers: int,
) -> Row:
    """Compiles; `layer` is the shape of a layer's pages on a device."""
    layer_bytes = int(np.prod(layer)) * jnp.dtype(layer_dtype).itemsize
    cache_bytes = num_layers * layer_bytes
    start_s = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*args)
    traced_s = time.perf_counter()
    compiled = lowered.compile()
    done_s = time.perf_counter()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and costs is not None
    text = compiled.as_text() or ""
    found = re.findall(
        r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
        text,
    )
    problems = []
    dims = ",".join(map(str, layer))
    if re.search(rf"= \w+\[{dims}\]\S* (copy|copy-start|fusion|dynamic-update-slice)\(", text):
        problems.append("a layer's cache is copied")
    if memory.alias_size_in_bytes < cache_bytes:
        problems.append("outputs do not share the cache")
    if memory.temp_size_in_bytes >= layer_bytes:
        problems.append("temporaries are as large as a layer's cache")
    return Row(
        topology=topology,
        program=program,
        trace_s=traced_s - start_s,
        compile_s=done_s - traced_s,
        cache_mib=cache_bytes / MIB,
        alias_mib=memory.alias_size_in_bytes / MIB,
        temp_mib=memory.temp_size_in_bytes / MIB,
        code_mib=memory.generated_code_size_in_bytes / MIB,
        bytes_accessed=costs.get("bytes accessed", 0.0),
        flops=costs.get("flops", 0.0),
        collectives=" ".join(f"{found.count(kind)} {kind}" for kind in sorted(set(found))),
        problem="; ".join(problems),
    )


def check_kernel(here: Here, case: KernelCase) -> Row:
    """The op, with its plan."""
    device, shape = here.devices[0], case.shape
    blocks = choose_blocks(replace(TPUS[device.device_kind], num_cores=device.num_cores), shape)
    assert blocks is not None, "the cases fit every device"
    plan, attention = tpu.make_plan(shape, blocks), tpu.make_paged_attention(shape, blocks)
    spec = AttentionSpec(scale=shape.head_dim**-0.5, window=case.window, soft_cap=case.soft_cap)
    num_tokens = case.num_seqs if case.decode_only else case.num_tokens
    heads, group, head_dim = shape.num_kv_heads, shape.group, shape.head_dim

    def run(layout: StepLayout, q: Any, k: Any, v: Any, pages: Any, params: Any) -> Any:
        places = locate_tokens(
            layout, num_tokens=num_tokens, num_pages=case.num_pages, page_size=shape.page_size
        )
        batch = plan(layout, places, decode_only=case.decode_only)
        return attention(q, k, v, pages, batch, spec, params)

    pages = here.array((case.num_pages, heads, shape.page_size, 2 * head_dim), shape.page_dtype)
    args = (
        _abstract_layout(here, case),
        here.array((num_tokens, heads, group, head_dim), shape.query_dtype),
        here.array((num_tokens, heads, head_dim), shape.query_dtype),
        here.array((num_tokens, heads, head_dim), shape.query_dtype),
        pages,
        AttentionParams(
            here.array((heads, group), "float32"),
            here.array((heads,), "float32"),
            here.array((heads,), "float32"),
        )
        if case.has_params
        else AttentionParams(),
    )
    with jax.set_mesh(here.mesh):
        return check(
            here.topology,
            case.name,
            run,
            args,
            donate=(4,),
            layer=pages.shape,
            layer_dtype=shape.page_dtype,
            num_layers=1,
        )


def check_jax_kernel(here: Here, *, num_kv_heads: int, group: int, head_dim: int) -> Row:
    """JAX's own kernel, which reads the cache only, for the same sizes as "H128 bfloat16"."""
    num_tokens, num_seqs, page_size, num_pages = 512, 64, 32, 2048
    heads = num_kv_heads * group
    args = (
        here.array((num_tokens, heads, head_dim), "bfloat16"),
        here.array((num_pages, page_size, 2 * num_kv_heads, head_dim), "bfloat16"),
        here.array((num_seqs,), "int32"),
        here.array((num_seqs, 512), "int32"),
        here.array((num_seqs + 1,), "int32"),
        here.array((1,), "int32"),
    )

    def run(*args: Any) -> Any:
        return ragged_paged_attention(
            *args,
            sm_scale=head_dim**-0.5,
            sliding_window=1024,
            num_kv_pages_per_block=16,
            num_queries_per_block=32,
            vmem_limit_bytes=64 * MIB,
        )

    with jax.set_mesh(here.mesh):
        return check(
            here.topology,
            f"JAX's own, H{head_dim}",
            run,
            args,
            donate=(),
            layer=args[1].shape,
            layer_dtype="bfloat16",
            num_layers=0,
        )


def _abstract_layout(here: Here, case: KernelCase) -> StepLayout:
    return StepLayout(
        slots_S=here.array((case.num_seqs,), "int32"),
        starts_S=here.array((case.num_seqs,), "int32"),
        query_starts_S1=here.array((case.num_seqs + 1,), "int32"),
        num_seqs=here.array((), "int32"),
        num_decodes=here.array((), "int32"),
        page_table_RM=here.array((case.num_seqs, case.num_columns), "int32"),
    )


def check_steps(here: Here, *, tensor: int) -> Iterator[Row]:
    """Whole steps of an engine with Llama-3.2-1B, heads spread over `tensor` devices."""
    page_size, limits = 32, EngineLimits(
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_model_len=16384,
        page_size=32,
        num_pages=8192,
    )  # fmt: skip
    definition = define_model(LLAMA_1B, tensor=tensor)
    shape, device = definition.shape, here.devices[0]
    kernels = choose_kernels(
        platform="tpu",
        device_kind=device.device_kind,
        num_cores=device.num_cores,
        attention_shape=AttentionShape(
            num_kv_heads=shape.num_kv_heads // tensor,
            group=shape.queries_per_kv,
            head_dim=shape.head_dim,
            query_dtype="bfloat16",
            page_dtype="bfloat16",
            page_size=page_size,
        ),
    )
    mesh = make_mesh(tensor=tensor, devices=here.devices)
    model = make_abstract(definition, mesh, kernels, dtype="bfloat16")
    arrays = abstract_arrays(model, limits, kv_cache_dtype="bfloat16")
    pages = arrays.pages_L[0]
    assert pages.sharding is not None
    for bucket in (
        Bucket(num_tokens=64, num_seqs=64, decode_only=True),
        Bucket(num_tokens=512, num_seqs=64, decode_only=False),
        Bucket(num_tokens=2048, num_seqs=64, decode_only=False),
    ):
        with jax.set_mesh(mesh):
            yield check(
                here.topology,
                f"Llama-3.2-1B TP={tensor} {bucket}",
                make_step(model.step_model(limits), bucket),
                (arrays.weights, arrays.pages_L, arrays.state, _words(arrays, bucket, page_size)),
                donate=(1, 2),
                layer=pages.sharding.shard_shape(pages.shape),
                layer_dtype="bfloat16",
                num_layers=shape.num_layers,
            )


def _words(arrays: AbstractArrays, bucket: Bucket, page_size: int) -> jax.ShapeDtypeStruct:
    sharding = jax.tree.leaves(arrays.state)[0].sharding
    return jax.ShapeDtypeStruct((num_words(bucket, page_size),), np.int32, sharding=sharding)


def show(row: Row) -> None:
    print(
        f"| {row.topology} | {row.program} | {row.trace_s:.1f} | {row.compile_s:.1f} "
        f"| {row.cache_mib:.0f} | {row.alias_mib:.0f} | {row.temp_mib:.1f} | {row.code_mib:.1f} "
        f"| {row.bytes_accessed / MIB:.0f} | {row.collectives} | {row.problem or 'ok'} |",
        flush=True,
    )


def rows_of(what: str, names: list[str]) -> Iterator[Row]:
    for name in names:
        here = Here(name)
        if what == "steps":
            yield from check_steps(here, tensor=min(4, len(here.devices)))
            continue
        for case in kernel_cases():
            yield check_kernel(here, case)
        yield check_jax_kernel(here, num_kv_heads=4, group=4, head_dim=128)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kernels", "steps"))
    parser.add_argument("--topology", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(HEADER)
    rows = []
    for row in rows_of(args.what, args.topology):
        show(row)
        rows.append(row)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
