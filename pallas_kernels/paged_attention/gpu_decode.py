"""Decode attention on Hopper: every split of a sequence's keys is a thread block, then a combine.

See gpu_mosaic.py for what is shared. Of the warpgroups of a thread block one copies
pages to shared memory, block of keys after block of keys, and two attend: the even blocks and the
odd ones, each with its own online softmax, so they never wait for each other. A slot of shared
memory is always of the same warpgroup, since the number of slots is even. (Heads of 256 leave
room for one attending warpgroup.) Each writes a partial result, its normalised output and the log2
of its sum of weights; gpu_combine.py weighs the partial results of a sequence.

The tile's 64 rows hold the queries of one kv head, so most are idle: a decode is bound by the
bytes of its keys, and the idle rows cost only tensor-core time that nobody else wants.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.api import StepLayout
from pallas_kernels.paged_attention.gpu_mosaic import (
    COMPUTE_REGISTERS,
    LOAD_REGISTERS,
    ROWS,
    KernelSpec,
    KeyRing,
    KeySource,
    Ref,
    attend_block,
    compiler_params,
    empty_state,
    erase_rows,
    iota,
    load_blocks,
    per_row,
    pieces_of,
    tiled_smem,
)
from pallas_kernels.paged_attention.gpu_work import DecodeSplits


def attend_splits(
    q_SKGH: Array,
    pages_PKBC: Array,
    layout: StepLayout,
    splits: DecodeSplits,
    scale2_K: Array,
    spec: KernelSpec,
) -> tuple[Array, Array]:
    """Partial results of every split: outputs float32 [N', K, G, H], log2 sums [N', K, ROWS].

    N' = consumers * N; those of a split are neighbours. What is no split's is not written.
    """
    num_seqs, num_heads, group, head_dim = q_SKGH.shape
    padded_group = -(-group // 8) * 8  # rows of a copy
    q_XGH = jnp.pad(q_SKGH, ((0, 0), (0, 0), (0, padded_group - group), (0, 0)))
    q_XGH = q_XGH.reshape(num_seqs * num_heads, padded_group, head_dim)
    pieces = pieces_of(pages_PKBC, spec)
    num_partials = spec.consumers * splits.info_N4.shape[0]
    dtype = pages_PKBC.dtype
    scratch = {
        "q": tiled_smem((ROWS, head_dim), q_SKGH.dtype),
        "keys": tiled_smem((spec.num_slots, spec.key_block, 2 * head_dim), dtype),
        "out": plgpu.SMEM((spec.consumers, ROWS, head_dim), jnp.float32),
        "log_sum": plgpu.SMEM((spec.consumers, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(),
        "keys_ready": plgpu.Barrier(num_arrivals=spec.copies, num_barriers=spec.num_slots),
        "keys_free": plgpu.Barrier(num_barriers=spec.num_slots),
    }

    def body(*refs: Ref, **smem: Ref) -> None:
        _split_body(_Refs(*refs), _Smem(**smem), spec)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_partials, num_heads, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_partials, num_heads, ROWS), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(splits.info_N4.shape[0], num_heads),
        grid_names=("split", "head"),
        num_threads=spec.consumers + 1,
        thread_name="wg",
        compiler_params=compiler_params(),
        interpret=spec.interpret,
    )(q_XGH, pieces, layout.page_table_RM, splits.info_N4, splits.seq_N, scale2_K)


class _Refs(NamedTuple):
    """In GMEM; a split's rows of `info` are those of gpu_work.DecodeSplits."""

    q: Ref  # [S * K, padded G, H]
    pieces: Ref  # of pages, see gpu_mosaic.pieces_of
    table: Ref
    info: Ref
    seq: Ref
    scale: Ref
    out: Ref
    log_sum: Ref


class _Smem(NamedTuple):
    """In shared memory: tiles and barriers."""

    q: Ref
    keys: Ref
    out: Ref  # a tile for each attending warpgroup
    log_sum: Ref
    q_ready: Ref
    keys_ready: Ref
    keys_free: Ref


def _split_body(refs: _Refs, smem: _Smem, spec: KernelSpec) -> None:
    split, head, wg = (lax.axis_index(name) for name in ("split", "head", "wg"))
    table_row, position, first, end = (refs.info[split, field] for field in range(4))
    ring = KeyRing(smem.keys, smem.keys_ready, smem.keys_free)
    is_real, seen = end > 0, first  # `seen`: first key that the query sees
    if spec.window is not None:
        seen = jnp.maximum(first, position - spec.window + 1)
        first = seen // spec.key_block * spec.key_block
    num_blocks = jnp.maximum(end - first + spec.key_block - 1, 0) // spec.key_block

    @pl.when(is_real & (wg < spec.consumers))
    def attend() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        scale2 = refs.scale[head]
        plgpu.barrier_wait(smem.q_ready)

        def step(turn: Array, state: Any) -> Any:
            block = spec.consumers * turn + wg
            slot = block % spec.num_slots
            first_key = first + block * spec.key_block
            plgpu.barrier_wait(ring.ready.at[slot])

            @pl.when((first_key < seen) | (first_key + spec.key_block > end))
            def erase() -> None:
                kept = (seen - first_key, end - first_key)
                for row in range(0, spec.key_block, ROWS):
                    erase_rows(ring.smem.at[slot], row, kept, spec)

            def visible() -> Array:
                key_XZ = iota((ROWS, spec.key_block), 1, spec) + first_key
                return (key_XZ >= seen) & (key_XZ < end)

            state = attend_block(state, smem.q, ring.smem.at[slot], scale2, visible, spec)
            plgpu.barrier_arrive(ring.free.at[slot])
            return state

        turns = (num_blocks - wg + spec.consumers - 1) // spec.consumers
        state = lax.fori_loop(0, turns, step, empty_state(spec))
        is_empty_X = state.sum_X == 0.0
        safe_sum_X = jnp.where(is_empty_X, 1.0, state.sum_X)
        smem.out[wg] = state.acc_XH / per_row(safe_sum_X, state.acc_XH.shape)
        smem.log_sum[wg] = state.max_X + jnp.log2(safe_sum_X)
        plgpu.commit_smem()
        partial = split * spec.consumers + wg
        plgpu.copy_smem_to_gmem(smem.out.at[wg, pl.ds(0, spec.group)], refs.out.at[partial, head])
        plgpu.copy_smem_to_gmem(smem.log_sum.at[wg], refs.log_sum.at[partial, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(is_real & (wg == spec.consumers))
    def load() -> None:
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        num_heads, padded_group = refs.scale.shape[0], refs.q.shape[1]
        plgpu.copy_gmem_to_smem(
            refs.q.at[refs.seq[split] * num_heads + head],
            smem.q.at[pl.ds(0, padded_group)],
            smem.q_ready,
        )
        last_column = position // spec.page_size
        source = KeySource(refs.pieces, refs.table, table_row, last_column, head, num_heads)
        load_blocks(source, ring, first, num_blocks, spec)
