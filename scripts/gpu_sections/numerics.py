"""One attention implementation against the reference in float32: plain, and with every feature.

The check is the one that the engine runs at its start, over more shapes and layers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from gpu_sections.child import SectionRun
from gpu_sections.ops import our_attention
from pallas_kernels.paged_attention.api import AttentionParams, AttentionSpec
from pallas_kernels.paged_attention.check import check_paged_attention
from pallas_kernels.paged_attention.quantized import is_quantized
from pallas_kernels.paged_attention.tuning import AttentionShape

NUM_KV_HEADS, GROUP = 4, 4


class _Case(NamedTuple):
    name: str
    page_size: int
    spec: AttentionSpec
    has_sinks: bool = False


def run(section: SectionRun) -> None:
    options = section.options
    backend = options["backend"]
    for case in _cases(options["head_dim"]):
        if not section.has(5):
            section.row(case=case.name, skipped="no time is left")
            continue
        shape = AttentionShape(
            num_kv_heads=1 if section.is_rehearsal else NUM_KV_HEADS,
            group=GROUP,
            head_dim=options["head_dim"],
            query_dtype="bfloat16",
            page_dtype=options["page_dtype"],
            page_size=case.page_size,
        )
        op = our_attention(backend, options, shape)
        if isinstance(op, str):
            section.row(case=case.name, skipped=op)
            return
        report = check_paged_attention(*op, shape, spec=case.spec, params=_params(shape, case))
        section.row(
            case=case.name,
            max_error=report.max_error if report.max_error == report.max_error else None,
            failure=report.failure,
            seconds=round(report.seconds, 1),
        )
        if section.is_rehearsal:
            return  # interpreted, one takes long enough


def _cases(head_dim: int) -> Iterator[_Case]:
    scale = head_dim**-0.5
    yield _Case("plain, page 16", 16, AttentionSpec(scale=scale))
    yield _Case(
        "window 40, cap 20, sinks",
        16,
        AttentionSpec(scale=scale, window=40, soft_cap=20.0),
        has_sinks=True,
    )
    yield _Case("page 32", 32, AttentionSpec(scale=scale))
    yield _Case("page 64, window 100", 64, AttentionSpec(scale=scale, window=100))


def _params(shape: AttentionShape, case: _Case) -> AttentionParams:
    heads = jnp.arange(shape.num_kv_heads, dtype=jnp.float32)
    sinks = jnp.linspace(-1.0, 1.0, shape.num_kv_heads * shape.group)
    # Powers of two: a quotient between two stored values is rounded alike by every compiler.
    scale_K = jnp.exp2(-5.0 - heads % 2) if is_quantized(shape.page_dtype) else None
    return AttentionParams(
        sinks_KG=sinks.reshape(shape.num_kv_heads, shape.group) if case.has_sinks else None,
        k_scale_K=scale_K,
        v_scale_K=scale_K,
    )
