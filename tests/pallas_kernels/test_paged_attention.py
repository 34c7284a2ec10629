"""One test for every backend of paged attention: any ragged step, against dense softmax in numpy.

A new backend is one line in BACKENDS (docs/add-a-kernel.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array

from jaxinfer.config.env import cache_dir
from pallas_kernels.native.library import NativeAttention, load_native_kernels
from pallas_kernels.paged_attention import cpu, reference, xla
from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionParams,
    AttentionSpec,
    PagedAttention,
    PlanAttention,
    StepLayout,
    locate_tokens,
)
from tests.pallas_kernels.ragged import Sequence, Shapes, make_step, random_params, sequences
from tests.quick_jit import quick_jit
from tests.tolerances import ATTENTION


@dataclass(frozen=True)
class Backend:
    """One implementation, and the dtype of the page arrays it keeps a dtype's values in."""

    plan: PlanAttention
    attention: PagedAttention
    storage_dtype: Callable[[np.dtype], jnp.dtype]


@cache
def native_attention(
    head_dim: int, page_dtype: str, macros: tuple[str, ...] = ()
) -> NativeAttention:
    """The C++ kernel, kept where the engine keeps it; skips where there is no compiler."""
    native = load_native_kernels(
        cache_dir() / "native", head_dim=head_dim, page_dtype=page_dtype, macros=macros
    )
    if native.paged_attention is None:
        pytest.skip(native.paged_attention_reason)
    return native.paged_attention


def cpp(shapes: Shapes, *macros: str) -> Backend:
    native = native_attention(shapes.H, shapes.page_np_dtype.name, macros)
    return Backend(xla.plan, cpu.make_paged_attention(native), xla.storage_dtype)


BACKENDS: dict[str, Callable[[Shapes], Backend]] = {
    "reference": lambda _: Backend(reference.plan, reference.paged_attention, jnp.dtype),
    "xla": lambda _: Backend(xla.plan, xla.paged_attention, xla.storage_dtype),
    # 16-bit floats kept as they are, which is not for CPUs
    "xla-plain": lambda _: Backend(xla.plan, xla.paged_attention, jnp.dtype),
    "cpp": cpp,
    "cpp-wide": lambda shapes: cpp(shapes, "JAXINFER_WIDE_VECTORS"),  # as on AVX-512
}


class Case(NamedTuple):
    shapes: Shapes
    spec: AttentionSpec
    decode_only: bool
    params: AttentionParams = NO_PARAMS


def mixed(
    spec: AttentionSpec,
    *,
    dtype: str = "float32",
    pages: str | None = None,
    sinks: bool = False,
    **sizes: int,
) -> Case:
    defaults = {"T": 112, "S": 6, "K": 2, "G": 3, "H": 32, "B": 16, "M": 20, "P": 48}
    shapes = Shapes(dtype=dtype, page_dtype=pages, **{**defaults, **sizes})
    params = random_params(shapes, sinks=sinks, scales=shapes.page_np_dtype.itemsize == 1)
    return Case(shapes, spec, decode_only=False, params=params)


def decodes(
    spec: AttentionSpec, *, dtype: str = "float32", pages: str | None = None, **sizes: int
) -> Case:
    case = mixed(spec, dtype=dtype, pages=pages, T=7, S=7, **sizes)
    return case._replace(decode_only=True)


CASES = {
    "grouped": mixed(AttentionSpec(scale=0.2)),
    "window": mixed(AttentionSpec(scale=0.2, window=21), K=1, G=4, B=4, M=70, P=150),
    "wide-window": mixed(AttentionSpec(scale=0.2, window=270), B=32, M=10, P=24, G=1),
    "soft-cap": mixed(AttentionSpec(scale=0.7, soft_cap=1.5), K=3, G=1, H=8, B=8, M=36, P=90),
    "bfloat16": mixed(AttentionSpec(scale=0.15), H=64, dtype="bfloat16"),
    "bfloat16-window": mixed(AttentionSpec(scale=0.2, window=16), G=2, dtype="bfloat16"),
    "sinks": mixed(AttentionSpec(scale=0.2, window=40), sinks=True, G=2),
    "int8-pages": mixed(AttentionSpec(scale=0.2), pages="int8", sinks=True),
    "bfloat16-pages": mixed(AttentionSpec(scale=0.2, window=70), pages="bfloat16"),
    "decodes-bfloat16-pages": decodes(AttentionSpec(scale=0.2), pages="bfloat16"),
    "decodes": decodes(AttentionSpec(scale=0.2), K=3),
    "decodes-fp8-pages": decodes(
        AttentionSpec(scale=0.2), H=64, dtype="bfloat16", pages="float8_e4m3fn"
    ),
    "decodes-window": decodes(AttentionSpec(scale=0.2, window=21), G=1, B=4, M=70, P=150),
    "decodes-bfloat16": decodes(AttentionSpec(scale=0.2, window=40), H=64, dtype="bfloat16"),
}
STEPS = {
    "nothing": [],
    "first-token": [Sequence(0, 1)],
    "chunks-of-whole-pages": [Sequence(0, 16), Sequence(16, 16), Sequence(48, 32)],
    "chunks-around-pages": [Sequence(0, 15), Sequence(15, 17), Sequence(17, 15), Sequence(31, 2)],
    "one-chunk-fills-the-step": [Sequence(208, 112)],
    "decodes-then-chunks": [Sequence(15, 1), Sequence(16, 1), Sequence(300, 1), Sequence(3, 80)],
}


def has_own_code(backend_name: str, case: Case) -> bool:
    """Whether the backend does not leave the case to "xla"."""
    if backend_name == "xla-plain":
        return case.shapes.page_np_dtype.name == "bfloat16"
    return not backend_name.startswith("cpp") or (
        case.spec.soft_cap is None and case.params.is_empty
    )


PAIRS = [
    (backend_name, case_name)
    for backend_name in BACKENDS
    for case_name, case in CASES.items()
    if has_own_code(backend_name, case)
]


@cache
def compiled(backend_name: str, case_name: str) -> Callable[..., tuple[Array, Array]]:
    """The op of one case; a second trace of it is an error."""
    shapes, spec, decode_only, params = CASES[case_name]
    backend = BACKENDS[backend_name](shapes)
    num_traces = 0

    def run(
        layout: StepLayout, q_TKGH: Array, k_TKH: Array, v_TKH: Array, pages_PKBC: Array
    ) -> tuple[Array, Array]:
        nonlocal num_traces
        num_traces += 1
        assert num_traces == 1, "the contents of a step made the op trace again"
        places = locate_tokens(
            layout, num_tokens=q_TKGH.shape[0], num_pages=shapes.P, page_size=shapes.B
        )
        batch = backend.plan(layout, places, decode_only=decode_only)
        return backend.attention(q_TKGH, k_TKH, v_TKH, pages_PKBC, batch, spec, params)

    return quick_jit(run, donate_argnums=(4,))


def check_step(backend_name: str, case_name: str, sequences: list[Sequence], seed: int) -> None:
    """Runs the op; compares the outputs of real tokens, and every bit of the pages."""
    shapes, spec, _, params = CASES[case_name]
    step = make_step(sequences, shapes, spec, seed=seed, params=params)
    storage = BACKENDS[backend_name](shapes).storage_dtype(shapes.page_np_dtype)
    out_TKGH, pages_PKBC = compiled(backend_name, case_name)(
        step.layout, step.q_TKGH, step.k_TKH, step.v_TKH, step.pages_PKBC.view(storage)
    )
    assert out_TKGH.dtype == shapes.np_dtype and pages_PKBC.dtype == storage
    num_tokens = int(step.layout.query_starts_S1[-1])
    absolute, relative = ATTENTION[shapes.dtype]
    np.testing.assert_allclose(
        np.asarray(out_TKGH)[:num_tokens].astype(np.float64),
        step.expected_TKGH[:num_tokens],
        rtol=relative,
        atol=absolute,
    )
    np.testing.assert_array_equal(
        np.asarray(pages_PKBC).view(np.uint8), step.new_pages_PKBC.view(np.uint8)
    )


@pytest.mark.parametrize(("backend_name", "case_name"), PAIRS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_step_is_dense_attention(backend_name: str, case_name: str, data: st.DataObject):
    shapes, _, decode_only, _ = CASES[case_name]
    found = data.draw(sequences(shapes, decode_only=decode_only))
    check_step(backend_name, case_name, found, seed=data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("step_name", STEPS)
@pytest.mark.parametrize("case_name", ["grouped", "bfloat16-window"])
@pytest.mark.parametrize("backend_name", ["reference", "xla", "cpp"])
def test_steps_at_the_edges(backend_name: str, case_name: str, step_name: str):
    check_step(backend_name, case_name, STEPS[step_name], seed=0)


@pytest.mark.parametrize("case_name", ["grouped", "bfloat16", "decodes-bfloat16"])
@pytest.mark.parametrize("backend_name", ["xla", "cpp"])
def test_pages_are_changed_in_place(backend_name: str, case_name: str):
    """Compiled for a large pool: its memory is the pool's, and there is no second one."""
    shapes, spec, decode_only, _ = CASES[case_name]
    backend = BACKENDS[backend_name](shapes)
    shapes = replace(shapes, P=4096)
    step = make_step([], replace(shapes, P=1), spec, seed=0)

    def run(
        layout: StepLayout, q_TKGH: Array, k_TKH: Array, v_TKH: Array, pages_PKBC: Array
    ) -> tuple[Array, Array]:
        places = locate_tokens(layout, num_tokens=shapes.T, num_pages=shapes.P, page_size=shapes.B)
        batch = backend.plan(layout, places, decode_only=decode_only)
        return backend.attention(q_TKGH, k_TKH, v_TKH, pages_PKBC, batch, spec)

    pages = jax.ShapeDtypeStruct(
        (shapes.P, *step.pages_PKBC.shape[1:]), backend.storage_dtype(shapes.np_dtype)
    )
    inputs = (step.layout, step.q_TKGH, step.k_TKH, step.v_TKH, pages)
    memory = quick_jit(run, donate_argnums=(4,)).lower(*inputs).compile().memory_analysis()
    assert memory is not None
    num_bytes = pages.size * pages.dtype.itemsize
    assert memory.alias_size_in_bytes == num_bytes
    assert memory.temp_size_in_bytes < num_bytes / 4
