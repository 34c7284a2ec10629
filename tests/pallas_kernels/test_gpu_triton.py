"""The Triton kernels of paged attention, interpreted: any ragged step, and nothing poisoned."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import Array

from pallas_kernels.paged_attention.api import AttentionSpec
from tests.pallas_kernels.gpu_cases import Case, check_step, compile_case
from tests.pallas_kernels.ragged import Sequence, Shapes, random_params, sequences


def mixed(
    spec: AttentionSpec,
    *,
    dtype: str = "float32",
    pages: str | None = None,
    sinks: bool = False,
    decode_only: bool = False,
    **sizes: int,
) -> Case:
    defaults = {"T": 60, "S": 5, "K": 2, "G": 3, "H": 16, "B": 16, "M": 20, "P": 50}
    shapes = Shapes(dtype=dtype, page_dtype=pages, **{**defaults, **sizes})
    params = random_params(shapes, sinks=sinks, scales=pages is not None)
    return Case("triton", shapes, spec, decode_only, params)


def decodes(spec: AttentionSpec, **sizes: Any) -> Case:
    return mixed(spec, decode_only=True, T=5, **sizes)


# Compiling a case takes most of the time, so the fast ones have as many features as go together.
FAST = {
    "bf16-window-cap-sinks": mixed(
        AttentionSpec(scale=0.3, window=21, soft_cap=2.0),
        dtype="bfloat16", sinks=True, B=4, M=60, P=150,
    ),
    "decodes-int8": decodes(
        AttentionSpec(scale=0.1, window=150), dtype="bfloat16", pages="int8", M=40, P=120
    ),
    "fp8-as-bits": mixed(
        AttentionSpec(scale=0.1), dtype="bfloat16", pages="float8_e4m3fn", M=16, P=40
    )._replace(compute_capability="8.0"),
}  # fmt: skip
SLOW = {
    "window-sinks": mixed(AttentionSpec(scale=0.3, window=21), sinks=True, B=4, M=60, P=150),
    "bf16-cap": mixed(AttentionSpec(scale=0.2, soft_cap=2.0), dtype="bfloat16", H=64, G=1),
    "plain": mixed(AttentionSpec(scale=0.2), G=20),
    "fp8": mixed(AttentionSpec(scale=0.1), dtype="bfloat16", pages="float8_e4m3fn", H=32),
    "decodes-sinks": decodes(AttentionSpec(scale=0.2), sinks=True, K=3, M=60, P=200),
    "decodes-window": decodes(AttentionSpec(scale=0.3, window=9), B=8, M=60, P=150),
    "odd-pages": mixed(AttentionSpec(scale=0.2), B=24, M=14, P=40),
}
CASES = FAST | SLOW
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
STEPS = {
    "nothing": [],
    "first-token": [Sequence(0, 1)],
    "chunks-around-pages": [Sequence(0, 15), Sequence(15, 17), Sequence(17, 15), Sequence(31, 2)],
    "decodes-then-chunk": [Sequence(15, 1), Sequence(16, 1), Sequence(230, 1), Sequence(3, 57)],
}


@cache
def compiled(case_name: str) -> Callable[..., tuple[Array, Array]]:
    return compile_case(CASES[case_name])


@pytest.mark.parametrize("case_name", NAMES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_step_is_dense_attention(case_name: str, data: st.DataObject):
    case = CASES[case_name]
    found = data.draw(sequences(case.shapes, decode_only=case.decode_only))
    check_step(case, compiled(case_name), found, seed=data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("step_name", STEPS)
def test_steps_at_the_edges(step_name: str):
    name = "bf16-window-cap-sinks"
    check_step(CASES[name], compiled(name), STEPS[step_name], seed=0)
