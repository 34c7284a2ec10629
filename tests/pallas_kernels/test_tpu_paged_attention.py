"""The TPU kernels of paged attention on a simulated TPU: any ragged step, and no data races.

The interpreter runs DMAs when they are waited for, memory starts as NaN, and its race detector is
on: it prints what it finds. What a compiler makes of the kernels is for scripts/check_targets.
"""

import json
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.api import (
    AttentionParams,
    AttentionSpec,
    StepLayout,
    locate_tokens,
)
from pallas_kernels.paged_attention.tpu_stream import Ref
from pallas_kernels.paged_attention.tuning import AttentionShape, TpuBlocks, refusal
from tests.pallas_kernels.ragged import Sequence, Shapes, make_step, random_params, sequences
from tests.quick_jit import quick_jit
from tests.tolerances import ATTENTION

RACE = "RACE DETECTED"


class Case(NamedTuple):
    shapes: Shapes
    spec: AttentionSpec
    blocks: TpuBlocks
    decode_only: bool
    params: AttentionParams
    side_by_side: bool  # cores are simulated so, which takes ten times as long; else in turn


def mixed(
    spec: AttentionSpec,
    *,
    dtype: str = "float32",
    pages: str | None = None,
    sinks: bool = False,
    cores: int = 1,
    buffers: int = 2,
    decode_only: bool = False,
    side_by_side: bool = False,
    **sizes: int,
) -> Case:
    """Blocks of 128 keys or more, of 16 queries; pages of one tile unless said otherwise."""
    defaults = {"T": 72, "S": 6, "K": 2, "G": 3, "H": 64, "B": 32, "M": 12, "P": 30}
    shapes = Shapes(dtype=dtype, page_dtype=pages, **{**defaults, **sizes})
    blocks = TpuBlocks(
        pages_per_block=128 // shapes.B,
        chunk_pages_per_block=128 // shapes.B,
        num_buffers=buffers,
        query_block=16,
        num_cores=cores,
        vmem_limit_bytes=2**24,
    )
    params = random_params(shapes, sinks=sinks, scales=pages is not None)
    return Case(shapes, spec, blocks, decode_only, params, side_by_side)


def decodes(spec: AttentionSpec, *, sinks: bool = False, **sizes: Any) -> Case:
    return mixed(spec, sinks=sinks, decode_only=True, T=6, **sizes)


# Compiling a case takes most of the time, so the fast ones have as many features as go together.
FAST = {
    "chunks-int8-window-cap-sinks-2-cores": mixed(
        AttentionSpec(scale=0.2, window=37, soft_cap=4.0), pages="int8", sinks=True, cores=2, T=160,
    ),
    "decodes-bf16-window": decodes(
        AttentionSpec(scale=0.1, window=150), dtype="bfloat16", K=1, G=9, B=16, M=300, P=310,
    ),
}  # fmt: skip
SLOW = {
    "chunks-window-2-cores": mixed(
        AttentionSpec(scale=0.2, window=37), cores=2, T=160, B=8, M=48, P=120,
    ),
    "chunks-int8-sinks": mixed(AttentionSpec(scale=0.1), pages="int8", sinks=True, H=128, G=1),
    "decodes-fp8-cap-2-cores": decodes(
        AttentionSpec(scale=0.3, soft_cap=2.0), pages="float8_e4m3fn", cores=2, buffers=4, H=256,
    ),
    "chunks-bf16": mixed(AttentionSpec(scale=0.15), dtype="bfloat16", K=9, G=1, buffers=4),
    "chunks-bf16-256": mixed(AttentionSpec(scale=0.1), dtype="bfloat16", K=1, G=8, H=256, cores=2),
    "chunks-as-jax": mixed(
        AttentionSpec(scale=0.1, window=70, soft_cap=3.0), H=128, G=2,
    ),
    "chunks-cap-sinks": mixed(AttentionSpec(scale=0.3, soft_cap=1.5), sinks=True, B=64, M=6, P=20),
    "chunks-fp8": mixed(
        AttentionSpec(scale=0.1, window=64), dtype="bfloat16", pages="float8_e4m3fn", H=128,
    ),
    "chunks-bf16-int8": mixed(AttentionSpec(scale=0.1), dtype="bfloat16", pages="int8", B=64, M=6),
    "chunks-long": mixed(AttentionSpec(scale=0.2), B=8, M=300, P=320, T=200, buffers=4),
    "decodes-f32": decodes(AttentionSpec(scale=0.1), sinks=True, K=3, G=8, cores=2, H=192),
    "decodes-int8": decodes(AttentionSpec(scale=0.2, window=20), pages="int8", B=64, M=6),
    "cores-side-by-side": mixed(
        AttentionSpec(scale=0.2), T=40, S=3, K=1, M=6, P=12, cores=2, side_by_side=True,
    ),
}  # fmt: skip
CASES = FAST | SLOW


@cache
def compiled(case_name: str) -> Callable[..., tuple[Array, Array]]:
    case = CASES[case_name]
    interpret = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=case.blocks.num_cores if case.side_by_side else 1
    )
    return quick_jit(op_of(case, interpret), donate_argnums=(4,))


def op_of(case: Case, interpret: pltpu.InterpretParams | bool) -> Callable[..., Any]:
    shapes, spec, blocks, decode_only, params, _ = case
    shape = AttentionShape(
        num_kv_heads=shapes.K,
        group=shapes.G,
        head_dim=shapes.H,
        query_dtype=shapes.dtype,
        page_dtype=shapes.page_np_dtype.name,
        page_size=shapes.B,
    )
    assert refusal(shape) is None
    plan = tpu.make_plan(shape, blocks)
    attention = tpu.make_paged_attention(shape, blocks, interpret=interpret)

    def run(
        layout: StepLayout, q_TKGH: Array, k_TKH: Array, v_TKH: Array, pages_PKBC: Array
    ) -> tuple[Array, Array]:
        places = locate_tokens(layout, num_tokens=shapes.T, num_pages=shapes.P, page_size=shapes.B)
        batch = plan(layout, places, decode_only=decode_only)
        return attention(q_TKGH, k_TKH, v_TKH, pages_PKBC, batch, spec, params)

    return run


def check_step(
    case_name: str, found: list[Sequence], capfd: pytest.CaptureFixture[str], *, seed: int
) -> None:
    """Outputs of real tokens, zeros elsewhere, every bit of the pages, and no race."""
    shapes, spec, _, _, params, _ = CASES[case_name]
    step = make_step(found, shapes, spec, seed=seed, params=params, poison_before_window=True)
    out, pages = compiled(case_name)(
        step.layout, step.q_TKGH, step.k_TKH, step.v_TKH, step.pages_PKBC
    )
    num_tokens = int(step.layout.query_starts_S1[-1])
    out_TKGH = np.asarray(out)
    assert out_TKGH.dtype == shapes.np_dtype
    tolerance = ATTENTION[shapes.dtype]
    np.testing.assert_allclose(
        out_TKGH[:num_tokens].astype(np.float64),
        step.expected_TKGH[:num_tokens],
        rtol=tolerance.relative,
        atol=tolerance.absolute,
    )
    assert not out_TKGH[num_tokens:].any()
    np.testing.assert_array_equal(
        np.asarray(pages).view(np.uint8), step.new_pages_PKBC.view(np.uint8)
    )
    assert RACE not in capfd.readouterr().out


STEPS = {
    "nothing": [],
    "decodes-then-chunks": [Sequence(31, 1), Sequence(32, 1), Sequence(250, 1), Sequence(3, 60)],
    "chunks-in-one-block": [Sequence(0, 3), Sequence(15, 17), Sequence(127, 2), Sequence(129, 9)],
    "a-chunk-fills-the-step": [Sequence(200, 160)],  # more writes than are on their way at once
}


@pytest.mark.parametrize("step_name", STEPS)
def test_steps_at_the_edges(step_name: str, capfd: pytest.CaptureFixture[str]):
    check_step("chunks-int8-window-cap-sinks-2-cores", STEPS[step_name], capfd, seed=0)


@pytest.mark.parametrize(
    "case_name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_step_is_dense_attention(
    case_name: str, capfd: pytest.CaptureFixture[str], data: st.DataObject
):
    case = CASES[case_name]
    found = data.draw(sequences(case.shapes, decode_only=case.decode_only))
    check_step(case_name, found, capfd, seed=data.draw(st.integers(0, 99)))


def test_context_longer_than_a_fetch_of_page_table_entries(capfd: pytest.CaptureFixture[str]):
    """300 pages of a sequence, 128 entries a fetch; between two that are short."""
    found = [Sequence(0, 1), Sequence(4799, 1), Sequence(17, 1)]
    check_step("decodes-bf16-window", found, capfd, seed=1)


def test_pages_before_the_window_are_not_fetched(capfd: pytest.CaptureFixture[str]):
    """They are poison; the first key that is seen lies before, at and behind a page's start."""
    found = [Sequence(308, 1), Sequence(309, 1), Sequence(310, 1)]
    check_step("decodes-bf16-window", found, capfd, seed=2)


def test_the_detector_sees_a_race(capfd: pytest.CaptureFixture[str]):
    """A kernel that reads what a DMA is writing, so that silence above means something."""

    def kernel(source: Ref, out: Ref, buffer: Ref, sem: Ref) -> None:
        copy = pltpu.make_async_copy(source, buffer, sem)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    jax.block_until_ready(call(jnp.ones((8, 128), jnp.float32)))
    assert RACE in capfd.readouterr().out


def test_xla_is_told_to_leave_the_cache_in_hbm():
    """Whichever kernel reads it: XLA would bring a small one into VMEM, whole, for a few pages."""
    case = FAST["chunks-int8-window-cap-sinks-2-cores"]
    step = make_step([Sequence(31, 1), Sequence(3, 60)], case.shapes, case.spec, seed=0)
    args = (step.layout, step.q_TKGH, step.k_TKH, step.v_TKH, step.pages_PKBC)
    lowered = jax.jit(op_of(case, interpret=False)).trace(*args).lower(lowering_platforms=("tpu",))
    calls = [line for line in lowered.as_text().splitlines() if "@tpu_custom_call(" in line]
    assert len(calls) == 3, "decodes, the rows of chunks, chunks"
    pages = "tensor<" + "x".join(map(str, step.pages_PKBC.shape)) + "xi8>"
    for call in calls:
        operands = call.partition(" : (")[2].partition(") -> ")[0].split(", ")
        in_hbm = {"operand_index": operands.index(pages), "color": 0}
        assert json.dumps(in_hbm, separators=(",", ":")) in call.replace(r"\22", '"')
