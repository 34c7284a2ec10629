"""Prefill attention on Hopper: a thread block attends for a block of consecutive queries.

See gpu_mosaic.py for what is shared. Of the warpgroups of a thread block one copies pages to
shared memory and two attend, each for a tile of its own, to the same blocks of keys (the division
of labour of FlashAttention-3, Shah et al. 2024, arXiv 2407.08608). A tile's rows are the queries of
consecutive tokens, all query heads of the kv head next to each other: row r is query head r % G
of token r // G. So

    key <= position + r // G    is    (key - position) * G <= r,

and the same for a window's edge: masks need no division.

Blocks of keys that all rows see take a loop without masks. The last block may hold places nobody
wrote: the warpgroups erase them together, before either multiplies.
A tile may have rows that are no queries of its sequence. They compute nonsense from whatever
follows in the step and are not stored: the rows to store are copied in pieces of 64, 32, ... 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_mosaic import (
    COMPUTE_REGISTERS,
    LOAD_REGISTERS,
    LOG2_E,
    ROWS,
    KernelSpec,
    KeyRing,
    KeySource,
    Ref,
    RowState,
    attend_block,
    compiler_params,
    empty_state,
    erase_rows,
    iota,
    load_blocks,
    load_row_numbers,
    load_rows,
    per_row,
    pieces_of,
    tiled_smem,
)


def tokens_per_tile(group: int) -> int:
    """Whole tokens in a tile."""
    return ROWS // group


def attend_blocks(
    q_TKGH: Array,
    pages_PKBC: Array,
    page_table_RM: Array,
    info_I4: Array,
    scale2_K: Array,
    sinks_KG: Array | None,
    spec: KernelSpec,
) -> Array:
    """Attention [T, K, G, H] of the tokens in the blocks (gpu_work.PrefillBlocks); rest unwritten.

    `info_I4` was made with `spec.consumers * tokens_per_tile(G)` tokens per block.
    """
    num_tokens, num_heads, group, head_dim = q_TKGH.shape
    spare = spec.consumers * ROWS  # rows that the last tiles read past the end
    q_KXH = q_TKGH.transpose(1, 0, 2, 3).reshape(num_heads, num_tokens * group, head_dim)
    q_KXH = jnp.pad(q_KXH, ((0, 0), (0, spare), (0, 0)))
    pieces = pieces_of(pages_PKBC, spec)
    operands = [q_KXH, pieces, page_table_RM, info_I4, scale2_K]
    if sinks_KG is not None:  # as the rows of a tile have them
        repeats = -(-ROWS // group)
        sinks_KX = jnp.tile(sinks_KG.astype(jnp.float32) * LOG2_E, (1, repeats))[:, :ROWS]
        operands.append(sinks_KX)
    scratch = {
        "q": tiled_smem((spec.consumers, ROWS, head_dim), q_TKGH.dtype),
        "keys": tiled_smem((spec.num_slots, spec.key_block, 2 * head_dim), pages_PKBC.dtype),
        "out": plgpu.SMEM((spec.consumers, ROWS, head_dim), q_TKGH.dtype),
        "keys_ready": plgpu.Barrier(num_arrivals=spec.copies, num_barriers=spec.num_slots),
        "keys_free": plgpu.Barrier(num_arrivals=spec.consumers, num_barriers=spec.num_slots),
        "erased": plgpu.Barrier(num_arrivals=spec.consumers),
    }

    def body(*refs: Ref, **smem: Ref) -> None:
        *inputs, out_ref = refs
        sinks_ref = inputs.pop() if sinks_KG is not None else None
        _block_body(_Refs(*inputs, sinks=sinks_ref, out=out_ref), _Smem(**smem), spec)

    out_KXH = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_heads, num_tokens * group, head_dim), q_TKGH.dtype),
        scratch_types=scratch,
        grid=(info_I4.shape[0], num_heads),
        grid_names=("block", "head"),
        num_threads=spec.consumers + 1,
        thread_name="wg",
        compiler_params=compiler_params(),
        interpret=spec.interpret,
    )(*operands)
    return out_KXH.reshape(num_heads, num_tokens, group, head_dim).transpose(1, 0, 2, 3)


class _Refs(NamedTuple):
    """In GMEM; a block's row of `info` is that of gpu_work.PrefillBlocks."""

    q: Ref  # [K, T * G + spare, H]
    pieces: Ref  # of pages, see gpu_mosaic.pieces_of
    table: Ref
    info: Ref
    scale: Ref
    sinks: Ref | None  # [K, ROWS]
    out: Ref  # [K, T * G, H]


class _Smem(NamedTuple):
    """In shared memory: tiles and barriers."""

    q: Ref  # a tile for each attending warpgroup
    keys: Ref
    out: Ref  # likewise
    keys_ready: Ref
    keys_free: Ref
    erased: Ref


def _block_body(refs: _Refs, smem: _Smem, spec: KernelSpec) -> None:
    block, head, wg = (lax.axis_index(name) for name in ("block", "head", "wg"))
    table_row, position, token, count = (refs.info[block, field] for field in range(4))
    ring = KeyRing(smem.keys, smem.keys_ready, smem.keys_free)
    end = position + count  # of the keys that any row sees
    seen = jnp.int32(0)  # first key that any row sees
    if spec.window is not None:
        seen = jnp.maximum(position - spec.window + 1, 0)
    first = seen // spec.key_block * spec.key_block
    num_blocks = (end - first + spec.key_block - 1) // spec.key_block

    @pl.when((count > 0) & (wg < spec.consumers))
    def attend() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        skipped = wg * tokens_per_tile(spec.group)  # tokens of the warpgroups before
        my_position, row = position + skipped, (token + skipped) * spec.group
        smem.q[wg] = load_rows(refs.q, (head, pl.ds(row, ROWS)), spec)
        plgpu.commit_smem()
        scale2 = refs.scale[head]

        def visible(first_key: Array) -> Array:
            shape_XZ = (ROWS, spec.key_block)
            row_XZ = iota(shape_XZ, 0, spec)
            ahead_XZ = (iota(shape_XZ, 1, spec) + (first_key - my_position)) * spec.group
            visible_XZ = ahead_XZ <= row_XZ
            if spec.window is not None:
                visible_XZ &= ahead_XZ + spec.window * spec.group > row_XZ
            return visible_XZ

        def step(index: Array, state: RowState, *, is_masked: bool) -> RowState:
            slot = index % spec.num_slots
            first_key = first + index * spec.key_block
            plgpu.barrier_wait(ring.ready.at[slot])
            if is_masked:
                kept = (seen - first_key, end - first_key)
                _erase(ring.smem.at[slot], smem.erased, wg, kept, spec)
            mask = (lambda: visible(first_key)) if is_masked else None
            state = attend_block(state, smem.q.at[wg], ring.smem.at[slot], scale2, mask, spec)
            plgpu.barrier_arrive(ring.free.at[slot])
            return state

        # Blocks of which the first row sees the last key; with a window, none is taken so.
        num_plain = jnp.int32(0)
        if spec.window is None:
            num_plain = jnp.minimum((my_position + 1) // spec.key_block, num_blocks - 1)
        state = lax.fori_loop(
            0, num_plain, lambda i, s: step(i, s, is_masked=False), empty_state(spec)
        )
        state = lax.fori_loop(num_plain, num_blocks, lambda i, s: step(i, s, is_masked=True), state)
        sink_X = None
        if refs.sinks is not None:
            sink_X = load_row_numbers(refs.sinks, head, spec)
        smem.out[wg] = _normalised(state, sink_X).astype(smem.out.dtype)
        plgpu.commit_smem()
        my_rows = jnp.clip(count - skipped, 0, tokens_per_tile(spec.group)) * spec.group
        _store_rows(smem.out.at[wg], refs.out.at[head], row, my_rows)

    @pl.when((count > 0) & (wg == spec.consumers))
    def load() -> None:
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        last_column, num_heads = (end - 1) // spec.page_size, refs.scale.shape[0]
        source = KeySource(refs.pieces, refs.table, table_row, last_column, head, num_heads)
        load_blocks(source, ring, first, num_blocks, spec)


def _erase(
    kv_smem: Ref, erased: Ref, wg: Array, kept: tuple[Array, Array], spec: KernelSpec
) -> None:
    """Erases in a block of keys that all share; each warpgroup waits for the others."""

    @pl.when((kept[0] > 0) | (kept[1] < spec.key_block))
    def _erase_together() -> None:
        for part in range(spec.key_block // ROWS):

            @pl.when(wg == part % spec.consumers)
            def _erase_part(part: int = part) -> None:
                erase_rows(kv_smem, part * ROWS, kept, spec)

        plgpu.barrier_arrive(erased)
        plgpu.barrier_wait(erased)


def _normalised(state: RowState, sink_X: Array | None) -> Array:
    sum_X, scale_X = state.sum_X, None
    if sink_X is not None:
        # The sum is relative to the largest logit; a larger sink makes all else small.
        max_X = jnp.maximum(state.max_X, sink_X)
        scale_X = jnp.exp2(state.max_X - max_X)
        sum_X = sum_X * scale_X + jnp.exp2(sink_X - max_X)
    factor_X = 1.0 / sum_X if scale_X is None else scale_X / sum_X
    return state.acc_XH * per_row(factor_X, state.acc_XH.shape)


def _store_rows(out_smem: Ref, out_ref: Ref, first_row: Array, num_rows: Array) -> None:
    """Copies the first rows of a tile, in pieces whose sizes are the bits of their number."""
    size = ROWS
    while size:

        @pl.when(num_rows & size != 0)
        def _store(size: int = size) -> None:
            start = num_rows // (2 * size) * (2 * size)
            plgpu.copy_smem_to_gmem(
                out_smem.at[pl.ds(start, size)], out_ref.at[pl.ds(first_row + start, size)]
            )

        size //= 2
    plgpu.wait_smem_to_gmem(0)
