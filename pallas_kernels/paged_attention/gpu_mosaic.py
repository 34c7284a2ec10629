"""What the Mosaic GPU kernels share: shared-memory tiles, page loads and the softmax step.

Knows Hopper's rules, nothing of work lists:

* wgmma multiplies [64, k] by [k, n]; the left side may be registers, the right side is shared
  memory in tiles of 8 rows x 128 bytes, swizzled. The copy engine (TMA) writes such tiles only
  at rows that are multiples of 8, in GMEM too, so nothing here starts a copy elsewhere.
* A tile has 64 rows; a kernel uses those that it has queries for. Rows never mix, so the others
  may hold anything, NaN included, and are not stored.
* The softmax is online and in base 2 (Milakov & Gimelshein 2018, arXiv 1805.02867; Shah et al.
  2024, arXiv 2407.08608). A masked logit is the finite `MASKED`, not -inf: a row that has seen no
  key yet keeps arithmetic free of NaN, and what it gathered is scaled by 2**MASKED = 0 later.
* Places that no token was written to may hold NaN. Keys there only make logits that are masked;
  values there would make 0 * NaN, so `erase_rows` overwrites them in shared memory. The same
  goes for what lies before a window in its first block: those pages may be another's by now.

`interpret` runs a kernel in JAX's simulator of warpgroups, copies and barriers on a CPU. Layouts
mean nothing there, and it does not carry accumulators through `run_state`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

ROWS = 64  # of a tile of queries
MASKED = -1e30
LOG2_E = math.log2(math.e)
COMPUTE_REGISTERS, LOAD_REGISTERS = 232, 40  # per thread; 3 x 128 threads share 64k registers

Ref = Any  # references have no public type


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """What is static in both kernels."""

    group: int  # query heads of a kv head
    head_dim: int
    page_size: int
    key_block: int  # keys multiplied at a time
    num_slots: int  # blocks of keys in shared memory; a multiple of `consumers`
    consumers: int  # warpgroups that compute; one more loads
    window: int | None
    soft_cap: float | None
    interpret: Any = None  # None, or InterpretGPUParams

    @property
    def rows_per_copy(self) -> int:
        return min(self.page_size, self.key_block)

    @property
    def copies(self) -> int:
        """Page copies of a block of keys."""
        return self.key_block // self.rows_per_copy


def compiler_params() -> plgpu.CompilerParams:
    """Rows are reduced within a warp, so the space for reductions across warps is kept small."""
    return plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024)


class RowState(NamedTuple):
    """The online softmax of 64 rows: output so far, its sum of weights, the largest logit."""

    acc_XH: Array
    sum_X: Array
    max_X: Array


def pieces_of(pages_PKBC: Array, spec: KernelSpec) -> Array:
    """Pages as a list of the pieces that one copy brings, [P * K * pieces, rows, 2H]."""
    return pages_PKBC.reshape(-1, spec.rows_per_copy, pages_PKBC.shape[-1])


def tiled_smem(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Shared memory in the tiles that wgmma reads."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def as_layout(value: Array, layout: Any, spec: KernelSpec) -> Array:
    return value if spec.interpret is not None else plgpu.layout_cast(value, layout)


def iota(shape: tuple[int, int], dim: int, spec: KernelSpec) -> Array:
    return as_layout(lax.broadcasted_iota(jnp.int32, shape, dim), plgpu.Layout.WGMMA, spec)


def load_rows(ref: Ref, idx: Any, spec: KernelSpec) -> Array:
    """[64, n] of a reference, held as wgmma holds a tile."""
    if spec.interpret is not None:
        return ref[idx]
    return plgpu.load(ref, idx, layout=plgpu.Layout.WGMMA, optimized=False)


def load_row_numbers(ref: Ref, index: Array, spec: KernelSpec) -> Array:
    """[64] of a reference, a number for each row of a tile."""
    if spec.interpret is not None:
        return ref[index]
    by_row = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.load(ref, (index,), layout=by_row, optimized=False)


def per_row(value: Array, shape: tuple[int, ...]) -> Array:
    """A number for each row, as a matrix."""
    return lax.broadcast_in_dim(value, shape, (0,))


def empty_state(spec: KernelSpec) -> RowState:
    by_row = plgpu.Layout.WGMMA.reduce(1)
    return RowState(
        as_layout(jnp.zeros((ROWS, spec.head_dim), jnp.float32), plgpu.Layout.WGMMA, spec),
        as_layout(jnp.zeros((ROWS,), jnp.float32), by_row, spec),
        as_layout(jnp.full((ROWS,), MASKED, jnp.float32), by_row, spec),
    )


def multiply_keys(q_smem: Ref, keys: Ref, spec: KernelSpec) -> Array:
    """Logits of a tile of queries with a block of keys, float32."""
    if spec.interpret is not None:  # the simulator's wgmma knows no transposed operand
        return jnp.dot(q_smem[...], keys[...].T, preferred_element_type=jnp.float32)

    def body(acc_ref: Ref) -> Array:
        plgpu.wgmma(acc_ref, q_smem, keys.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((ROWS, spec.key_block), jnp.float32))


def multiply_add(acc_XH: Array, weights_XZ: Array, values: Any, spec: KernelSpec) -> Array:
    """acc + weights @ values, in the accumulator's registers."""
    if spec.interpret is not None:  # nor one in registers
        return acc_XH + jnp.dot(weights_XZ, values[...], preferred_element_type=jnp.float32)

    def in_place(acc_ref: Ref) -> None:
        plgpu.wgmma(acc_ref, weights_XZ, values)

    state: Any = plgpu.WGMMAAccumulatorRef.init(acc_XH)
    return pl.run_state(in_place)(state)


def attend_block(
    state: RowState,
    q_smem: Ref,
    kv_smem: Ref,
    scale2: Array,
    visible: Callable[[], Array] | None,
    spec: KernelSpec,
) -> RowState:
    """Takes one block of keys and values, [key_block, 2H] in shared memory, into the state.

    `scale2`: of the logits, in units of log2. `visible()` makes the mask [64, key_block]; None
    when every row sees every key.
    """
    head_dim, shape_XZ = spec.head_dim, (ROWS, spec.key_block)
    keys, values = kv_smem.at[:, pl.ds(0, head_dim)], kv_smem.at[:, pl.ds(head_dim, head_dim)]
    logits_XZ = multiply_keys(q_smem, keys, spec)
    logits_XZ *= scale2
    if spec.soft_cap is not None:
        # tanh by way of exp2: the hardware's own is good to 11 bits, and the cap multiplies that
        cap2 = spec.soft_cap * LOG2_E
        logits_XZ = cap2 - 2.0 * cap2 / (1.0 + jnp.exp2(logits_XZ * (2.0 * LOG2_E / cap2)))
    if visible is not None:
        logits_XZ = jnp.where(visible(), logits_XZ, MASKED)
    max_X = jnp.maximum(state.max_X, logits_XZ.max(axis=1))
    decay_X = jnp.exp2(state.max_X - max_X)
    weights_XZ = jnp.exp2(logits_XZ - per_row(max_X, shape_XZ))
    sum_X = state.sum_X * decay_X + weights_XZ.sum(axis=1)
    acc_XH = state.acc_XH * per_row(decay_X, state.acc_XH.shape)
    acc_XH = multiply_add(acc_XH, weights_XZ.astype(kv_smem.dtype), values, spec)
    return RowState(acc_XH, sum_X, max_X)


def erase_rows(kv_smem: Ref, first_row: int, kept: tuple[Array, Array], spec: KernelSpec) -> None:
    """Zeroes the values of those of the rows first_row..+64 that are not in kept[0]..kept[1]."""
    idx = (pl.ds(first_row, ROWS), pl.ds(spec.head_dim, spec.head_dim))
    values_XH = load_rows(kv_smem, idx, spec).astype(jnp.float32)
    row_XH = iota((ROWS, spec.head_dim), 0, spec) + first_row
    kept_XH = jnp.where((row_XH >= kept[0]) & (row_XH < kept[1]), values_XH, 0.0)
    kv_smem[idx] = kept_XH.astype(kv_smem.dtype)
    plgpu.commit_smem()


class KeyRing(NamedTuple):
    """Blocks of keys and values in shared memory, and who may use them."""

    smem: Ref  # [slot, key_block, 2H]
    ready: Ref  # barrier of each slot: its copies have come
    free: Ref  # barrier of each slot: those who attend are done with it


class KeySource(NamedTuple):
    """Where the keys of a sequence and head are."""

    pieces_ref: Ref  # see `pieces_of`
    table_ref: Ref
    table_row: Array
    last_column: Array  # of its row in the page table, of its last token
    head: Array
    num_heads: int


def load_blocks(
    source: KeySource, ring: KeyRing, first_key: Array, num_blocks: Array, spec: KernelSpec
) -> None:
    """The loading warpgroup's work: block after block of keys, each into the slot that is due."""

    @pl.loop(0, num_blocks)
    def _load(block: Array) -> None:
        slot = block % spec.num_slots

        @pl.when(block >= spec.num_slots)
        def _wait() -> None:
            plgpu.barrier_wait(ring.free.at[slot])

        _copy_block(source, ring, slot, first_key + block * spec.key_block, spec)

    # No barrier is left with an arrival that was not waited for.
    @pl.loop(jnp.maximum(num_blocks - spec.num_slots, 0), num_blocks)
    def _drain(block: Array) -> None:
        plgpu.barrier_wait(ring.free.at[block % spec.num_slots])


def _copy_block(
    source: KeySource, ring: KeyRing, slot: Array, first_key: Array, spec: KernelSpec
) -> None:
    """Starts the copies of one block of keys and values; the barrier counts `spec.copies`.

    Behind the sequence's last page the last page is copied again: memory that is known to be
    there, for rows that are masked.
    """
    rows = spec.rows_per_copy
    columns = [
        jnp.minimum((first_key + copy * rows) // spec.page_size, source.last_column)
        for copy in range(spec.copies)
    ]
    # All loads of page numbers before the first copy, so that they are under way together.
    pages = [source.table_ref[source.table_row, column] for column in columns]
    pieces = spec.page_size // rows
    piece = first_key % spec.page_size // rows  # 0 where a page is one piece
    for copy, page in enumerate(pages):
        plgpu.copy_gmem_to_smem(
            source.pieces_ref.at[(page * source.num_heads + source.head) * pieces + piece],
            ring.smem.at[slot, pl.ds(copy * rows, rows)],
            ring.ready.at[slot],
        )
