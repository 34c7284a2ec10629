"""How fast one implementation of attention is over a grid: ours, cuDNN's, or JAX's own kernel.

Ours write the step's keys into their pages and attend; cuDNN and JAX's kernel only attend, over
keys that are there, cuDNN's in one contiguous array a sequence. A call's queries are the output of
the call before it, so none can be left out or run beside another.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpu_sections.child import SectionRun
from gpu_sections.grid import Point, points
from gpu_sections.ops import our_attention
from gpu_sections.timing import Loop, Work, compile_loop
from pallas_kernels.paged_attention.api import (
    AttentionBatch,
    AttentionSpec,
    StepLayout,
    locate_tokens,
)
from pallas_kernels.paged_attention.tuning import AttentionShape

_DTYPE = jnp.bfloat16
_NUM_COMPILERS = 8
_POINT_S = 1.5  # to make the inputs of a point and time it


class Given(NamedTuple):
    """An integer array that is no random one."""

    value: np.ndarray


def run(section: SectionRun) -> None:
    backend = section.options["backend"]
    pool = ThreadPoolExecutor(_NUM_COMPILERS)
    for point, work, future in list(_begin(pool, section, backend)):
        found = (
            {"skipped": work} if isinstance(work, str) else _measure(section, point, work, future)
        )
        section.row(backend=backend, **point.describe(), **found)
    pool.shutdown(wait=False, cancel_futures=True)


def _measure(
    section: SectionRun, point: Point, work: Work, future: "Future[Loop]"
) -> dict[str, Any]:
    try:
        loop = future.result(timeout=max(section.left_s - _POINT_S, 0))
        return _figures(section.options, point, loop.seconds(*_arguments(work)))
    except TimeoutError:
        return {"skipped": "no time is left"}
    except Exception as error:  # noqa: BLE001 - of a compiler or driver, one point of many
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def _begin(
    pool: ThreadPoolExecutor, section: SectionRun, backend: str
) -> Iterator[tuple[Point, Work | str, "Future[Loop]"]]:
    """Compilation of every point, side by side."""
    make = {"cudnn": _cudnn, "jax_paged": _jax_paged}.get(backend, partial(_ours, backend))
    for point in points(is_tiny=section.is_rehearsal):
        step = make(section.options, point)
        if isinstance(step, str):
            yield point, step, Future()
        else:
            yield point, step, pool.submit(_compile, step, point)


def _compile(work: Work, point: Point) -> Loop:
    carry, constants = jax.tree.map(_shape, (work.carry, work.constants), is_leaf=_is_leaf)
    expected_s = max(point.bytes_moved / 2e12, point.flops / 3e14)
    return compile_loop(work._replace(carry=carry, constants=constants), expected_s=expected_s)


def _arguments(work: Work) -> tuple[Any, tuple[Any, ...]]:
    """Random values of the shapes; integers are those that were given."""
    return jax.tree.map(_make, (work.carry, work.constants), is_leaf=_is_leaf)


def _is_leaf(leaf: Any) -> bool:
    return isinstance(leaf, Given)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, Given):
        return jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype)
    return leaf


def _figures(options: dict[str, Any], point: Point, seconds: float) -> dict[str, Any]:
    """Decodes are bound by bytes, chunks by operations: each beside the measured rate."""
    figures: dict[str, Any] = {"us": round(seconds * 1e6, 2)}
    if point.is_decode:
        rate = point.bytes_moved / seconds
        figures |= {
            "gb_per_s": round(rate / 1e9, 1),
            "share_of_copy": round(rate / options["copy_bytes_per_s"], 3),
        }
    else:
        rate = point.flops / seconds
        figures |= {
            "tflops_per_s": round(rate / 1e12, 1),
            "share_of_matmul": round(rate / options["matmul_flops_per_s"], 3),
        }
    return figures


def _make(leaf: Any) -> Array:
    if isinstance(leaf, Given):
        return jnp.asarray(leaf.value)
    return jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)


def _table(point: Point) -> tuple[np.ndarray, int]:
    """Pages in random order, int32 [batch, pages of a sequence], and how many there are."""
    each = -(-point.length // point.page_size)
    order = np.random.default_rng(0).permutation(point.batch * each)
    return order.reshape(point.batch, each).astype(np.int32), point.batch * each


def _together(*constants: Array) -> tuple[Array, ...]:
    return constants


def _ours(backend: str, options: dict[str, Any], point: Point) -> Work | str:
    shape = AttentionShape(
        num_kv_heads=point.num_kv_heads,
        group=point.group,
        head_dim=point.head_dim,
        query_dtype="bfloat16",
        page_dtype="bfloat16",
        page_size=point.page_size,
    )
    op = our_attention(backend, options, shape)
    if isinstance(op, str):
        return op
    plan, attend = op
    table, num_pages = _table(point)
    num_tokens = point.batch * point.chunk
    spec = AttentionSpec(scale=point.head_dim**-0.5)

    def prepare(kv: Array, layout: StepLayout) -> tuple[Array, AttentionBatch]:
        """What an engine's step does once for all layers."""
        places = locate_tokens(
            layout, num_tokens=num_tokens, num_pages=num_pages, page_size=point.page_size
        )
        return kv, plan(layout, places, decode_only=point.is_decode)

    def step(
        carry: tuple[Array, Array], prepared: tuple[Array, AttentionBatch]
    ) -> tuple[Array, Array]:
        q_TKGH, pages_PKBC = carry
        kv, batch = prepared
        return attend(q_TKGH, kv, kv, pages_PKBC, batch, spec)

    q = jax.ShapeDtypeStruct((num_tokens, point.num_kv_heads, point.group, point.head_dim), _DTYPE)
    kv = jax.ShapeDtypeStruct((num_tokens, point.num_kv_heads, point.head_dim), _DTYPE)
    pages = jax.ShapeDtypeStruct(
        (num_pages, point.num_kv_heads, point.page_size, 2 * point.head_dim), _DTYPE
    )
    layout = StepLayout(
        slots_S=Given(np.arange(point.batch, dtype=np.int32)),
        starts_S=Given(np.full(point.batch, point.context, np.int32)),
        query_starts_S1=Given(np.arange(point.batch + 1, dtype=np.int32) * point.chunk),
        num_seqs=Given(np.int32(point.batch)),
        num_decodes=Given(np.int32(point.batch if point.is_decode else 0)),
        page_table_RM=Given(table),
    )
    return Work(step, prepare, (q, pages), (kv, layout))


def _cudnn(options: dict[str, Any], point: Point) -> Work | str:
    if point.page_size != 16:
        return "it knows no pages"
    if point.context and not point.is_decode:
        return "its causal mask begins at the first key"
    implementation = "xla" if options["platform"] == "cpu" else "cudnn"

    def step(q: Array, kv: tuple[Array, Array]) -> Array:
        k, v = kv
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=not point.is_decode, implementation=implementation
        )

    q = jax.ShapeDtypeStruct((point.batch, point.chunk, point.num_heads, point.head_dim), _DTYPE)
    # cuDNN takes even lengths.
    length = point.length + point.length % 2
    kv_shape = (point.batch, length, point.num_kv_heads, point.head_dim)
    kv = jax.ShapeDtypeStruct(kv_shape, _DTYPE)
    return Work(step, _together, q, (kv, kv))


def _jax_paged(options: dict[str, Any], point: Point) -> Work | str:
    if not point.is_decode:
        return "it is for decodes"
    try:
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
    except ImportError as error:
        return f"this JAX has none: {error}"
    table, num_pages = _table(point)
    # Its blocks are of 8 pages, shared evenly by 16 parts.
    parts = 16 if options["platform"] == "gpu" else 1
    columns = -(-table.shape[1] // (8 * parts)) * 8 * parts
    table = np.pad(table, ((0, 0), (0, columns - table.shape[1])))

    def step(q: Array, rest: tuple[Array, ...]) -> Array:
        return paged_attention(q, *rest, k_splits=parts, interpret=options["platform"] == "cpu")

    q = jax.ShapeDtypeStruct((point.batch, point.num_heads, point.head_dim), _DTYPE)
    pages_shape = (point.num_kv_heads, num_pages, point.page_size, point.head_dim)
    pages = jax.ShapeDtypeStruct(pages_shape, _DTYPE)
    lengths = np.full(point.batch, point.length, np.int32)
    return Work(step, _together, q, (pages, pages, Given(table), Given(lengths)))
