"""Runs a chosen kernel on the device it was chosen for and compares it with the reference.

Knows the op and the reference; chooses nothing. A kernel that was compiled elsewhere, or by an
unknown version of a compiler, is not trusted with a user's tokens before it has given the right
answer once, here. It costs two small compilations and milliseconds.

What a check cannot do: bring back a device that the kernel has wedged (an illegal address ends a
CUDA context, and with it the process; a deadlock waits). Then only naming another implementation
helps.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionParams,
    AttentionSpec,
    PagedAttention,
    PlanAttention,
    StepLayout,
    locate_tokens,
)
from pallas_kernels.paged_attention.quantized import is_quantized
from pallas_kernels.paged_attention.tuning import AttentionShape

DECODES = (0, 15, 16, 127, 300)  # tokens in the cache before the step
CHUNKS = ((0, 70), (100, 37), (255, 2))  # likewise, and tokens of the chunk
BOUNDS = {"float32": 2e-3, "bfloat16": 3e-2, "float16": 5e-3}
"""Of the largest error, for outputs of about 1; well above rounding, well below a wrong key."""


class CheckReport(NamedTuple):
    """What came of a check."""

    max_error: float  # NaN: it did not run, or gave NaN
    failure: str | None  # None: the kernel is right
    seconds: float


class _Case(NamedTuple):
    layout: StepLayout
    q_TKGH: Array
    k_TKH: Array
    v_TKH: Array
    pages_PKBC: Array
    num_tokens: int  # that are real


def check_paged_attention(
    plan: PlanAttention,
    attend: PagedAttention,
    shape: AttentionShape,
    *,
    spec: AttentionSpec | None = None,
    params: AttentionParams = NO_PARAMS,
) -> CheckReport:
    """A step of decodes and a mixed step on the default device, against the reference.

    `shape.page_dtype` is the dtype of the page arrays. `spec`: of a layer of the model, or plain.
    """
    spec = AttentionSpec(scale=shape.head_dim**-0.5) if spec is None else spec
    start_s = time.monotonic()
    errors: list[float] = []
    try:
        for decode_only in (True, False):
            case = _make_case(shape, decode_only=decode_only)
            errors.append(_compare(case, _Run(plan, attend, spec, params, decode_only)))
    except Exception as error:  # noqa: BLE001 - of a compiler or driver: the caller falls back
        reason = f"it does not run: {type(error).__name__}: {str(error)[:300]}"
        return CheckReport(float("nan"), reason, time.monotonic() - start_s)
    max_error = float(np.max(errors))  # unlike max(), NaN if one of them is
    bound = BOUNDS[jnp.dtype(shape.query_dtype).name]
    failure = None
    if not max_error <= bound:  # NaN is no success
        failure = f"wrong by {max_error:.2g} where {bound:.2g} is allowed"
    return CheckReport(max_error, failure, time.monotonic() - start_s)


class _Run(NamedTuple):
    plan: PlanAttention
    attend: PagedAttention
    spec: AttentionSpec
    params: AttentionParams
    decode_only: bool

    def __call__(
        self, layout: StepLayout, q_TKGH: Array, k_TKH: Array, v_TKH: Array, pages_PKBC: Array
    ) -> tuple[Array, Array]:
        num_pages, _, page_size, _ = pages_PKBC.shape
        places = locate_tokens(
            layout, num_tokens=q_TKGH.shape[0], num_pages=num_pages, page_size=page_size
        )
        batch = self.plan(layout, places, decode_only=self.decode_only)
        return self.attend(q_TKGH, k_TKH, v_TKH, pages_PKBC, batch, self.spec, self.params)


def _compare(case: _Case, run: _Run) -> float:
    """The largest error of the outputs of real tokens; infinity if pages differ."""
    plain = run._replace(plan=reference.plan, attend=reference.paged_attention)
    inputs = case[:5]
    out_TKGH, pages_PKBC = jax.jit(lambda *args: run(*args))(*inputs)
    with jax.default_matmul_precision("highest"):
        expected_TKGH, expected_PKBC = jax.jit(lambda *args: plain(*args))(*inputs)
    got, expected = np.asarray(pages_PKBC), np.asarray(expected_PKBC)
    if not np.array_equal(got.view(np.uint8), expected.view(np.uint8)):
        return float("inf")
    difference_TKGH = out_TKGH.astype(jnp.float32) - expected_TKGH.astype(jnp.float32)
    return float(jnp.abs(difference_TKGH[: case.num_tokens]).max())


def _make_case(shape: AttentionShape, *, decode_only: bool) -> _Case:
    """A step with normal contents; NaN in all that nobody wrote, if the pages have one."""
    rng = np.random.default_rng(0)
    cached = [*DECODES, *(() if decode_only else (start for start, _ in CHUNKS)), 0]
    new = [1] * len(DECODES) + ([] if decode_only else [count for _, count in CHUNKS])
    num_tokens, num_seqs = sum(new), len(cached)  # the last sequence is padding
    padded_tokens = num_seqs if decode_only else num_tokens + 7
    pages_each = [
        -(-(start + count) // shape.page_size)
        for start, count in zip(cached[:-1], new, strict=True)
    ]
    num_pages = sum(pages_each) + 2
    table_RM = rng.integers(0, num_pages, (num_seqs + 1, max(pages_each) + 1), np.int32)
    free = list(rng.permutation(num_pages))
    is_written_PB = np.zeros((num_pages, shape.page_size), np.bool_)
    for seq, count in enumerate(pages_each):
        table_RM[seq, :count] = [free.pop() for _ in range(count)]
        at = np.arange(cached[seq])
        is_written_PB[table_RM[seq, at // shape.page_size], at % shape.page_size] = True

    def normal(*dims: int) -> Array:
        return jnp.asarray(rng.normal(size=dims), shape.query_dtype)

    heads, size = shape.num_kv_heads, shape.head_dim
    pages = rng.normal(size=(num_pages, heads, shape.page_size, 2 * size)).astype(np.float32)
    poison = 0.0 if is_quantized(shape.page_dtype) else np.nan
    pages = np.where(is_written_PB[:, None, :, None], pages, poison)
    layout = StepLayout(
        slots_S=jnp.arange(num_seqs, dtype=jnp.int32),
        starts_S=jnp.asarray(cached, jnp.int32),
        query_starts_S1=jnp.asarray(np.cumsum([0, *new, 0]), jnp.int32),
        num_seqs=jnp.int32(num_seqs - 1),
        num_decodes=jnp.int32(len(DECODES)),
        page_table_RM=jnp.asarray(table_RM),
    )
    return _Case(
        layout,
        normal(padded_tokens, heads, shape.group, size),
        normal(padded_tokens, heads, size),
        normal(padded_tokens, heads, size),
        jnp.asarray(pages, shape.page_dtype),
        num_tokens,
    )
