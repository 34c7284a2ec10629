"""The Mosaic GPU kernels in JAX's simulator of warpgroups, copies and barriers.

It finds deadlocks, arrivals nobody waits for, reads of memory that nobody wrote (NaN), and data
races. It knows nothing of layouts and swizzles: those are the compiler's to refuse. It compiles
anew for every thread block, so grids are tiny here.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels.paged_attention.api import AttentionSpec, StepLayout
from pallas_kernels.paged_attention.gpu import make_kernel_spec
from pallas_kernels.paged_attention.gpu_decode import attend_splits
from pallas_kernels.paged_attention.gpu_mosaic import LOG2_E, KernelSpec
from pallas_kernels.paged_attention.gpu_prefill import attend_blocks
from pallas_kernels.paged_attention.gpu_work import block_prefills, split_decodes
from tests.pallas_kernels.gpu_cases import (
    Case,
    check_step,
    compile_case,
    races_found,
    simulator,
)
from tests.pallas_kernels.ragged import Sequence, Shapes, Step, make_step, random_params
from tests.tolerances import ATTENTION


def case_of(spec: AttentionSpec, *, sinks: bool = False, decode_only: bool = False, **sizes: int):
    defaults = {"K": 1, "G": 3, "H": 64, "B": 16, "M": 40, "P": 60}
    shapes = Shapes(dtype="bfloat16", **{**defaults, **sizes})
    params = random_params(shapes, sinks=sinks, scales=False)
    return Case("mosaic_gpu", shapes, spec, decode_only, params, num_cores=1)


SLOW = {
    "one-decode": (
        case_of(AttentionSpec(scale=0.125), decode_only=True, T=1, S=1),
        [Sequence(260, 1)],
    ),
    "decode-and-chunk": (
        case_of(AttentionSpec(scale=0.2, window=70, soft_cap=3.0), sinks=True, T=51, S=2),
        [Sequence(100, 1), Sequence(180, 43)],
    ),
    "decodes-of-many-blocks": (
        case_of(AttentionSpec(scale=0.125), decode_only=True, sinks=True, T=2, S=2, M=80, P=160),
        [Sequence(1100, 1), Sequence(1200, 1)],
    ),
    "decodes-in-a-window": (
        case_of(AttentionSpec(scale=0.1, window=70), decode_only=True, T=2, S=2, B=64, M=12, P=30),
        [Sequence(500, 1), Sequence(640, 1)],
    ),
    "heads-of-256": (
        case_of(AttentionSpec(scale=0.1), T=40, S=2, G=2, H=256, B=128, M=4, P=8),
        [Sequence(300, 1), Sequence(150, 39)],
    ),
    "heads-of-128": (
        case_of(AttentionSpec(scale=0.1), T=40, S=2, G=8, H=128, B=8, M=60, P=100),
        [Sequence(100, 21), Sequence(300, 19)],
    ),
    "one-query-head": (
        case_of(AttentionSpec(scale=0.1, soft_cap=2.0), T=130, S=1, G=1, M=30),
        [Sequence(70, 130)],
    ),
}


def inputs_of(case: Case, found: list[Sequence]) -> tuple[Step, StepLayout, KernelSpec]:
    step = make_step(found, case.shapes, case.spec, seed=1, poison_before_window=True)
    phase = "decode" if case.decode_only else "prefill"
    simulated = simulator(detect_races=True)
    kernel = make_kernel_spec(phase, step.q_TKGH, step.pages_PKBC, case.spec, interpret=simulated)
    return step, jax.tree.map(jnp.asarray, step.layout), kernel


def scale2(case: Case) -> Array:
    return jnp.full((case.shapes.K,), case.spec.scale * LOG2_E, jnp.float32)


def test_a_split_of_a_decode():
    """Two warpgroups, five blocks of keys, of which the last is cut, in turn in two slots."""
    case = case_of(AttentionSpec(scale=0.125), decode_only=True, T=1, S=1)
    step, layout, kernel = inputs_of(case, [Sequence(260, 1)])
    kernel = replace(kernel, num_slots=2)
    splits = split_decodes(layout, blocks_at_once=1)
    splits = splits._replace(info_N4=splits.info_N4[:1], seq_N=splits.seq_N[:1])
    partial_NKGH, log_sum_NKX = attend_splits(
        step.q_TKGH, step.new_pages_PKBC, layout, splits, scale2(case), kernel
    )
    log_sum_NKG = np.asarray(log_sum_NKX)[:, :, : case.shapes.G]
    weight_NKG = np.exp2(log_sum_NKG - log_sum_NKG.max(axis=0))
    weight_NKG /= weight_NKG.sum(axis=0)
    assert (weight_NKG > 0.1).all()  # both did their part
    out_KGH = (weight_NKG[..., None] * np.asarray(partial_NKGH)).sum(axis=0)
    absolute, relative = ATTENTION["bfloat16"]
    np.testing.assert_allclose(out_KGH, step.expected_TKGH[0], rtol=relative, atol=absolute)
    assert not races_found()


def test_a_block_of_queries():
    """Two tiles with a window and a soft cap; blocks of keys are cut at both ends."""
    case = case_of(AttentionSpec(scale=0.2, window=70, soft_cap=3.0), T=40, S=1)
    step, layout, kernel = inputs_of(case, [Sequence(180, 40)])
    blocks = block_prefills(layout, num_tokens=40, tokens_per_block=42)
    out_TKGH = attend_blocks(
        step.q_TKGH,
        step.new_pages_PKBC,
        layout.page_table_RM,
        blocks.info_I4,
        scale2(case),
        None,
        kernel,
    )
    absolute, relative = ATTENTION["bfloat16"]
    out = np.asarray(out_TKGH).astype(np.float64)
    np.testing.assert_allclose(out, step.expected_TKGH, rtol=relative, atol=absolute)
    assert not races_found()


@pytest.mark.slow
@pytest.mark.timeout(900)  # the simulator compiles every thread block anew
@pytest.mark.parametrize("name", SLOW)
def test_the_op(name: str):
    case, found = SLOW[name]
    check_step(case, compile_case(case), found, seed=1)
    assert not races_found()
