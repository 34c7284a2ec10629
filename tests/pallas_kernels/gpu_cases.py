"""Runs the GPU implementations of paged attention on a CPU, interpreted, against dense softmax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionParams,
    AttentionSpec,
    StepLayout,
    locate_tokens,
)
from pallas_kernels.paged_attention.gpu import Dialect, GpuAttention
from pallas_kernels.paged_attention.gpu_choice import GpuSpec
from pallas_kernels.paged_attention.tuning import AttentionShape
from tests.pallas_kernels.ragged import Sequence, Shapes, make_step
from tests.quick_jit import quick_jit
from tests.tolerances import ATTENTION


class Case(NamedTuple):
    """One compilation of the op."""

    dialect: Dialect
    shapes: Shapes
    spec: AttentionSpec
    decode_only: bool = False
    params: AttentionParams = NO_PARAMS
    num_cores: int = 6
    compute_capability: str = "9.0"


def simulator(*, detect_races: bool) -> Any:
    """Parameters of Mosaic GPU's simulator, which is public since JAX 0.11."""
    if "InterpretGPUParams" in dir(plgpu):
        return plgpu.InterpretGPUParams(detect_races=detect_races)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=detect_races)


def races_found() -> bool:
    """Whether the last simulated kernel had a data race."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call.get_races().races_found


def compile_case(case: Case) -> Callable[..., tuple[Array, Array]]:
    """The op as a function of (layout, q, k, v, pages)."""
    shapes = case.shapes
    op = GpuAttention(
        dialect=case.dialect,
        device=GpuSpec(compute_capability=case.compute_capability, num_cores=case.num_cores),
        shape=AttentionShape(
            num_kv_heads=shapes.K,
            group=shapes.G,
            head_dim=shapes.H,
            query_dtype=shapes.dtype,
            page_dtype=shapes.page_np_dtype.name,
            page_size=shapes.B,
        ),
        interpret=True if case.dialect == "triton" else simulator(detect_races=True),
    )

    def run(
        layout: StepLayout, q_TKGH: Array, k_TKH: Array, v_TKH: Array, pages_PKBC: Array
    ) -> tuple[Array, Array]:
        places = locate_tokens(layout, num_tokens=shapes.T, num_pages=shapes.P, page_size=shapes.B)
        batch = op.plan(layout, places, decode_only=case.decode_only)
        return op.attend(q_TKGH, k_TKH, v_TKH, pages_PKBC, batch, case.spec, case.params)

    return quick_jit(run, donate_argnums=(4,))


def check_step(
    case: Case, run: Callable[..., tuple[Array, Array]], found: list[Sequence], *, seed: int
) -> None:
    """Outputs of real tokens, zeros for padding, and every bit of the pages."""
    step = make_step(
        found, case.shapes, case.spec, seed=seed, params=case.params, poison_before_window=True
    )
    out_TKGH, pages_PKBC = run(
        jax.tree.map(jnp.asarray, step.layout),
        step.q_TKGH,
        step.k_TKH,
        step.v_TKH,
        step.pages_PKBC,
    )
    num_tokens = int(step.layout.query_starts_S1[-1])
    out = np.asarray(out_TKGH).astype(np.float64)
    absolute, relative = ATTENTION[case.shapes.dtype]
    expected = step.expected_TKGH[:num_tokens]
    np.testing.assert_allclose(out[:num_tokens], expected, rtol=relative, atol=absolute)
    assert (out[num_tokens:] == 0).all()
    np.testing.assert_array_equal(
        np.asarray(pages_PKBC).view(np.uint8), step.new_pages_PKBC.view(np.uint8)
    )
