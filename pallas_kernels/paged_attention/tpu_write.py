"""The TPU kernel that writes the keys and values of prefill chunks to their pages.

Knows rows and pages; knows no attention. A write is of the rows of one tile of a page: rows that
are not the step's own are read first and written back as they are. Writes are independent, so
that a ring of them is on its way at once. The new rows lie in the step's order, and their page's
rows begin elsewhere: whole tiles around them are copied and moved to their place as float32, since
narrower rows cannot be moved one by one.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu_stream import Copy, Ref, in_hbm, rem, ring, tile_rows
from pallas_kernels.paged_attention.tpu_work import WriteField, Writes

_BUFFERS = 8
_AHEAD = _BUFFERS // 2


class _Refs(NamedTuple):
    writes: Ref  # SMEM int32 [COUNT * number of writes]
    bounds: Ref  # SMEM int32 [cores + 1]
    new: Ref  # HBM 16 or 32 bits, [K, T, C]
    pages_in: Ref
    pages: Ref  # HBM [P, K, B, C]
    new_ring: Ref  # VMEM [buffers, K, R + a tile, C]
    page_ring: Ref  # VMEM [buffers, K, R, C]
    new_sems: Ref
    old_sems: Ref
    write_sems: Ref


@dataclass(frozen=True)
class _WriteKernel:
    refs: _Refs
    rows: int

    def field(self, write: Array, field: int) -> Array:
        num_writes = self.refs.writes.shape[0] // WriteField.COUNT
        return self.refs.writes[field * num_writes + write]

    def first_copied(self, write: Array) -> Array:
        """Of the rows of `new` that are copied: they begin with a tile, and are all there."""
        tile, token = _tile_rows(self.refs.new.dtype), self.field(write, WriteField.TOKEN)
        last = self.refs.new.shape[1] - self.refs.new_ring.shape[2]
        return pl.multiple_of(jnp.clip(token - (token & (tile - 1)), 0, last), tile)

    def is_partial(self, write: Array) -> Array:
        first, end = self.field(write, WriteField.FIRST), self.field(write, WriteField.END)
        return (first > 0) | (end < self.rows)

    def place(self, write: Array) -> Ref:
        tile = self.field(write, WriteField.ROW_BLOCK)
        page = self.field(write, WriteField.PAGE)
        return self.refs.pages.at[page, :, tile_rows(tile, self.rows), :]

    def new_copy(self, write: Array) -> Copy:
        slot = ring(write, _BUFFERS)
        rows = pl.ds(self.first_copied(write), self.refs.new_ring.shape[2])
        return pltpu.make_async_copy(
            self.refs.new.at[:, rows, :],
            self.refs.new_ring.at[slot],
            self.refs.new_sems.at[slot],
        )

    def old_copy(self, write: Array) -> Copy:
        slot = ring(write, _BUFFERS)
        return pltpu.make_async_copy(
            self.place(write), self.refs.page_ring.at[slot], self.refs.old_sems.at[slot]
        )

    def write_copy(self, write: Array) -> Copy:
        slot = ring(write, _BUFFERS)
        return pltpu.make_async_copy(
            self.refs.page_ring.at[slot], self.place(write), self.refs.write_sems.at[slot]
        )

    def start_reads(self, write: Array, begin: Array, end: Array) -> None:
        @pl.when(write < end)
        def _() -> None:
            @pl.when(write - _BUFFERS >= begin)
            def _() -> None:
                self.write_copy(write - _BUFFERS).wait()

            self.new_copy(write).start()

            @pl.when(self.is_partial(write))
            def _() -> None:
                self.old_copy(write).start()

    def merge(self, write: Array) -> None:
        refs, slot = self.refs, ring(write, _BUFFERS)
        self.new_copy(write).wait()

        @pl.when(self.is_partial(write))
        def _() -> None:
            self.old_copy(write).wait()

        length = refs.new_ring.shape[2]
        token = self.field(write, WriteField.TOKEN)
        shift = rem(self.first_copied(write) - token + length, length)
        first, end = self.field(write, WriteField.FIRST), self.field(write, WriteField.END)
        shape = refs.page_ring.shape[2:]
        row_RC = lax.broadcasted_iota(jnp.int32, shape, 0)
        is_new_RC = (row_RC >= first) & (row_RC < end)

        def merge_head(head: Array, _: None) -> None:
            copied = refs.new_ring[slot, head].astype(jnp.float32)
            new_RC = pltpu.roll(copied, shift, axis=0)[: shape[0]]
            old_RC = refs.page_ring[slot, head].astype(jnp.float32)
            merged_RC = jnp.where(is_new_RC, new_RC, old_RC)
            refs.page_ring[slot, head] = merged_RC.astype(refs.page_ring.dtype)

        lax.fori_loop(0, refs.page_ring.shape[1], merge_head, None)
        self.write_copy(write).start()

    def run(self, begin: Array, end: Array) -> None:
        for ahead in range(_AHEAD):
            self.start_reads(begin + ahead, begin, end)

        def body(write: Array, _: None) -> None:
            self.start_reads(write + _AHEAD, begin, end)
            self.merge(write)

        lax.fori_loop(begin, end, body, None)
        # The last writes; start_reads has waited for those before.
        lax.fori_loop(
            jnp.maximum(end - _BUFFERS, begin),
            end,
            lambda write, _: self.write_copy(write).wait(),
            None,
        )


def _tile_rows(dtype: jnp.dtype) -> int:
    """Of 32 or 16 bits."""
    return 32 // dtype.itemsize


def _kernel(rows: int, *refs: Ref) -> None:
    kernel = _WriteKernel(_Refs(*refs), rows)
    core = pl.program_id(0)
    kernel.run(kernel.refs.bounds[core], kernel.refs.bounds[core + 1])


# Jitted, so that layers of the same shape are traced and lowered once.
@partial(jax.jit, static_argnames=("rows", "num_cores", "interpret"))
def write_chunks(
    kv_TKC: Array,
    pages_PKBC: Array,
    writes: Writes,
    *,
    rows: int,
    num_cores: int,
    interpret: pltpu.InterpretParams | bool,
) -> Array:
    """The pages with the step's rows, [T, K, C] as pages hold them, in their places."""
    _, num_kv, _, width = pages_PKBC.shape
    if kv_TKC.dtype.itemsize == 1:  # exact, and all that is loaded has tiles of two kinds
        kv_TKC = kv_TKC.astype(jnp.bfloat16)
    num_tokens, tile = kv_TKC.shape[0], _tile_rows(kv_TKC.dtype)
    length = rows + tile
    spare = max(length - num_tokens, -num_tokens % tile)
    new_KTC = jnp.pad(kv_TKC.swapaxes(0, 1), ((0, 0), (0, spare), (0, 0)))
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        partial(_kernel, rows),
        grid=(num_cores,),
        in_specs=[smem, smem, anywhere, hbm],
        out_specs=hbm,
        out_shape=jax.ShapeDtypeStruct(pages_PKBC.shape, pages_PKBC.dtype),
        scratch_shapes=[
            pltpu.VMEM((_BUFFERS, num_kv, length, width), new_KTC.dtype),
            pltpu.VMEM((_BUFFERS, num_kv, rows, width), pages_PKBC.dtype),
            *[pltpu.SemaphoreType.DMA((_BUFFERS,))] * 3,
        ],
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if num_cores > 1 else "arbitrary",),
        ),
        interpret=interpret,
        name="ragged_write_chunks",
    )(writes.fields, writes.bounds, new_KTC, in_hbm(pages_PKBC))
