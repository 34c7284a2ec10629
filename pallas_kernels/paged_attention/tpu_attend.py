"""The TPU kernel that attends: one pass over a list of items, pages streaming past them.

Knows the arithmetic of a step and the order of things; tpu_stream.py knows the DMAs, tpu.py the
design. The softmax is online (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022,
arXiv 2205.14135), in powers of two: a factor of log2(e) in the logits' factor is free.

Letters: those of tpu_stream.py, and Z keys of a block, L lanes of a register.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu_stream import (
    TABLE_BUFFERS,
    AttendConfig,
    Cursor,
    Inputs,
    Outputs,
    Ref,
    Scratch,
    Stream,
    div,
    rem,
    ring,
    tile_rows,
)
from pallas_kernels.paged_attention.tpu_work import ItemField
from pallas_kernels.paged_attention.tuning import LANES, TABLE_CHUNK

LOG2_E = math.log2(math.e)
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: infinity minus itself is NaN
_UNROLLED_ROWS = 64  # of heads that are computed side by side, so that units overlap


@dataclass(frozen=True)
class _Attention:
    """What is computed in a step."""

    stream: Stream

    @property
    def config(self) -> AttendConfig:
        return self.stream.config

    @property
    def scratch(self) -> Scratch:
        return self.stream.scratch

    def query_place(self, item: Array) -> Array:
        return ring(self.stream.query_block(item), self.config.num_query_buffers)

    def for_heads(self, do: Callable[[Array | int], None]) -> None:
        num_heads, most = self.config.num_kv_heads, max(1, _UNROLLED_ROWS // self.config.rows)
        together = max(n for n in range(1, most + 1) if num_heads % n == 0)
        if together == num_heads:
            for head in range(num_heads):
                do(head)
            return

        def some(turn: Array, _: None) -> None:
            for nth in range(together):
                do(turn * together + nth)

        lax.fori_loop(0, num_heads // together, some, None)

    def start_softmax(self, head: Array | int) -> None:
        config, scratch = self.config, self.scratch
        shape = (config.rows, LANES)
        max_YL = jnp.full(shape, _MASKED, jnp.float32)
        sum_YL = jnp.zeros(shape, jnp.float32)
        if self.stream.inputs.sinks is not None:  # a logit that was seen before all keys
            shift = config.query_block.bit_length() - 1
            query_head_YL = lax.broadcasted_iota(jnp.int32, shape, 0) >> shift
            for g in range(config.group):
                sink = self.stream.inputs.sinks[head * config.group + g]
                max_YL = jnp.where(query_head_YL == g, sink, max_YL)
            sum_YL = jnp.ones(shape, jnp.float32)
        scratch.max[head] = max_YL
        scratch.sum[head] = sum_YL
        scratch.acc[head] = jnp.zeros(scratch.acc.shape[1:], jnp.float32)

    def finish_tail(self, at: Cursor) -> None:
        """In the step with a sequence's last key: adds a decode's token, clears what follows.

        What follows on the page was never written, or by another sequence, and may be NaN.
        """
        config, scratch = self.config, self.scratch
        place = ring(at.step, config.num_buffers)
        last = self.stream.num_keys(at.item) - 1
        j = div(last, config.page_size) - at.block * config.pages_per_block
        row = rem(last, config.page_size)
        last_tile = div(row, config.page_rows)
        rows = tile_rows(last_tile, config.page_rows)
        shape = (config.num_kv_heads, config.page_rows, 2 * config.head_dim)
        row_KRC = lax.broadcasted_iota(jnp.int32, shape, 1) + last_tile * config.page_rows
        # Selected as float32, which has every value of a page: narrow types have no selection.
        tail_KRC = scratch.keys[place, j, :, rows, :].astype(jnp.float32)
        if scratch.new is not None and scratch.tails is not None:
            block = self.stream.query_block(at.item)
            new_KRC = jnp.broadcast_to(scratch.new[self.query_place(at.item)], shape)
            tail_KRC = jnp.where(row_KRC == row, new_KRC, tail_KRC)
            scratch.tails[self.query_place(at.item)] = tail_KRC.astype(scratch.tails.dtype)
            self.stream.start_tail(block)
        tail_KRC = jnp.where(row_KRC <= row, tail_KRC, 0.0)
        scratch.keys[place, j, :, rows, :] = tail_KRC.astype(scratch.keys.dtype)

        def clear(tile: Array, _: None) -> None:
            rows = tile_rows(tile, config.page_rows)
            scratch.keys[place, j, :, rows, :] = jnp.zeros(shape, scratch.keys.dtype)

        lax.fori_loop(last_tile + 1, config.page_size // config.page_rows, clear, None)

    def attend(self, at: Cursor) -> None:
        """All heads. The mask is left out where all is visible, if it costs enough to notice."""
        config, stream = self.config, self.stream
        if config.is_decode:
            self.for_heads(partial(self.attend_head, at, masked=True))
            return
        is_masked = (at.block + 1) * config.keys > stream.first_query(at.item) + 1
        if config.spec.window is not None:
            last_query = stream.num_keys(at.item) - 1
            is_masked |= at.block * config.keys <= last_query - config.spec.window

        @pl.when(is_masked)
        def _() -> None:
            self.for_heads(partial(self.attend_head, at, masked=True))

        @pl.when(jnp.logical_not(is_masked))
        def _() -> None:
            self.for_heads(partial(self.attend_head, at, masked=False))

    def attend_head(self, at: Cursor, head: Array | int, *, masked: bool) -> None:
        """One turn of the online softmax."""
        config, scratch = self.config, self.scratch
        query_YW = self.query_YW(at.item, head)
        kv_JBC = scratch.keys[ring(at.step, config.num_buffers), :, head]
        kv_ZC = kv_JBC.reshape(config.keys, 2 * config.head_dim)
        dtype = compute_dtype(query_YW.dtype, kv_ZC.dtype)
        kv_ZC = _convert(kv_ZC, dtype)
        # A head that fills no register: [q|0] by [k|v] is q by k, weights by [k|v] has, behind
        # what nobody wants, weights by v. The matrix unit is as wide as both.
        is_whole = config.head_dim % LANES == 0
        key_ZW = kv_ZC[:, : config.head_dim] if is_whole else kv_ZC
        value_ZW = kv_ZC[:, config.head_dim :] if is_whole else kv_ZC
        logits_YZ = _matmul(_convert(query_YW, dtype), key_ZW, contract_last=True)
        logits_YZ *= self.stream.inputs.factors[head]
        if config.spec.soft_cap is not None:
            logits_YZ = (config.spec.soft_cap * LOG2_E) * jnp.tanh(logits_YZ)
        if masked:
            logits_YZ = jnp.where(self.visible_YZ(at), logits_YZ, _MASKED)
        old_max_YL = scratch.max[head]
        max_YL = jnp.maximum(old_max_YL, logits_YZ.max(axis=1, keepdims=True))
        # Where a row has seen no key yet, weights are one; the first key it sees undoes them.
        weights_YZ = jnp.exp2(logits_YZ - _widen(max_YL, config.keys))
        decay_YL = jnp.exp2(old_max_YL - max_YL)
        scratch.max[head] = max_YL
        scratch.sum[head] = scratch.sum[head] * decay_YL + weights_YZ.sum(axis=1, keepdims=True)
        weighted_YW = _matmul(weights_YZ.astype(dtype), value_ZW, contract_last=False)
        scratch.acc[head] = scratch.acc[head] * _widen(decay_YL, config.width) + weighted_YW

    def query_YW(self, item: Array, head: Array | int) -> Array:
        query = self.scratch.queries[self.query_place(item), head]
        return query.reshape(self.config.rows, self.config.width)

    def visible_YZ(self, at: Cursor) -> Array:
        config = self.config
        shape = (config.rows, config.keys)
        key_YZ = lax.broadcasted_iota(jnp.int32, shape, 1) + at.block * config.keys
        query_YZ = self.stream.field(at.item, ItemField.POSITION)
        if not config.is_decode:
            query_YZ += lax.broadcasted_iota(jnp.int32, shape, 0) & (config.query_block - 1)
        visible_YZ = key_YZ <= query_YZ
        if config.spec.window is not None:
            visible_YZ &= key_YZ > query_YZ - config.spec.window
        return visible_YZ

    def finish_head(self, item: Array, head: Array | int) -> None:
        """An item's rows of its block's output; the others are other sequences'."""
        config, scratch, place = self.config, self.scratch, self.query_place(item)
        factor_YL = self.stream.inputs.factors[config.num_kv_heads + head] / scratch.sum[head]
        out_YW = scratch.acc[head] * _widen(factor_YL, config.width)
        if config.is_decode:
            scratch.out[place, head] = out_YW.astype(scratch.out.dtype)
            return
        row_XW = lax.broadcasted_iota(jnp.int32, (config.query_block, config.width), 0)
        is_own_XW = row_XW >= self.stream.field(item, ItemField.FIRST)
        is_own_XW &= row_XW < self.stream.field(item, ItemField.END)
        for g in range(config.group):
            out_XW = out_YW[g * config.query_block : (g + 1) * config.query_block]
            others_XW = scratch.out[place, head, g].astype(jnp.float32)
            out_XW = jnp.where(is_own_XW, out_XW, others_XW)
            scratch.out[place, head, g] = out_XW.astype(scratch.out.dtype)


def _run_step(attention: _Attention, at: Cursor, begin: Array, end: Array) -> None:
    """Computes a step whose pages are on their way."""
    stream = attention.stream
    block = stream.query_block(at.item)
    first_block, last_block = stream.query_block(begin), stream.query_block(end - 1)
    is_first, is_last = stream.is_first(at), stream.is_last(at)
    before, behind = jnp.maximum(at.item - 1, begin), jnp.minimum(at.item + 1, end - 1)
    opens = (at.item == begin) | (stream.query_block(before) != block)
    closes = (at.item == end - 1) | (stream.query_block(behind) != block)

    @pl.when(is_first & opens)
    def _() -> None:
        stream.wait_for_queries(block)
        stream.start_queries(block + stream.config.num_query_buffers - 1, last_block)
        stream.wait_for_out(block - stream.config.num_query_buffers, first_block)

    @pl.when(is_first)
    def _() -> None:
        attention.for_heads(attention.start_softmax)

    stream.wait_for_pages(at)

    @pl.when(is_last)
    def _() -> None:
        attention.finish_tail(at)

    attention.attend(at)

    @pl.when(is_last)
    def _() -> None:
        attention.for_heads(partial(attention.finish_head, at.item))

    @pl.when(is_last & closes)
    def _() -> None:
        stream.start_out(block)


def _run(stream: Stream, begin: Array, end: Array) -> None:
    """Items from `begin` up to `end`, at least one. Three cursors walk the same steps: one
    fetches entries of the page table, one starts the pages' DMAs a ring ahead, one computes."""
    config = stream.config
    first_block, last_block = stream.query_block(begin), stream.query_block(end - 1)

    def advance_table(_: Array | int, at: Cursor) -> Cursor:
        stream.start_table(at, end)
        return stream.next(at)

    def advance_loads(_: Array | int, at: tuple[Cursor, Cursor]) -> tuple[Cursor, Cursor]:
        table_at = advance_table(0, at[0])
        stream.start_pages(at[1], end)
        return table_at, stream.next(at[1])

    table_at = lax.fori_loop(0, TABLE_BUFFERS - 1, advance_table, stream.start(begin))
    for ahead in range(config.num_query_buffers - 1):
        stream.start_queries(first_block + ahead, last_block)
    stream.clear_pages()
    loads_at = (table_at, stream.start(begin))
    loads_at = lax.fori_loop(0, config.num_buffers - 1, advance_loads, loads_at)

    def turn(
        state: tuple[tuple[Cursor, Cursor], Cursor],
    ) -> tuple[tuple[Cursor, Cursor], Cursor]:
        loads_at, at = state
        loads_at = advance_loads(0, loads_at)
        _run_step(_Attention(stream), at, begin, end)
        return loads_at, stream.next(at)

    lax.while_loop(lambda state: state[1].item < end, turn, (loads_at, stream.start(begin)))
    for behind in range(config.num_query_buffers):
        stream.wait_for_out(last_block - behind, first_block)


def attend_kernel(config: AttendConfig, inputs: Inputs, out: Ref, *rest: Ref) -> None:
    """The kernel, of one core; `rest` is the pages, if it changes them, and the scratch."""
    *pages, scratch = rest
    outputs = Outputs(out, pages[0] if pages else None)
    begin, end = inputs.bounds[pl.program_id(0)], inputs.bounds[pl.program_id(0) + 1]

    @pl.when(begin < end)
    def _() -> None:
        _run(Stream(config, inputs, outputs, scratch), begin, end)


def scratch_of(config: AttendConfig, *, query_dtype: jnp.dtype, page_dtype: jnp.dtype) -> Scratch:
    """What the kernel keeps, as shapes."""
    heads, buffers = config.num_kv_heads, config.num_query_buffers
    page = (heads, config.page_size, 2 * config.head_dim)
    block = (buffers, heads, config.rows, config.width)
    if not config.is_decode:
        block = (buffers, heads, config.group, config.query_block, config.width)
    new = tails = None
    if config.is_decode:
        new = pltpu.VMEM((buffers, heads, 1, page[2]), jnp.float32)
        tails = pltpu.VMEM((buffers, heads, config.page_rows, page[2]), page_dtype)
    return Scratch(
        keys=pltpu.VMEM((config.num_buffers, config.pages_per_block, *page), page_dtype),
        table=pltpu.SMEM((TABLE_BUFFERS, 1, TABLE_CHUNK), jnp.int32),
        queries=pltpu.VMEM(block, query_dtype),
        out=pltpu.VMEM(block, query_dtype),
        new=new,
        tails=tails,
        max=pltpu.VMEM((heads, config.rows, LANES), jnp.float32),
        sum=pltpu.VMEM((heads, config.rows, LANES), jnp.float32),
        acc=pltpu.VMEM((heads, config.rows, config.width), jnp.float32),
        keys_sems=pltpu.SemaphoreType.DMA((config.num_buffers,)),
        table_sems=pltpu.SemaphoreType.DMA((TABLE_BUFFERS,)),
        queries_sems=pltpu.SemaphoreType.DMA((buffers,)),
        out_sems=pltpu.SemaphoreType.DMA((buffers,)),
    )


def compute_dtype(queries: jnp.dtype, keys: jnp.dtype) -> jnp.dtype:
    """Of the products; values of one byte are exact in any."""
    return keys if keys.itemsize > queries.itemsize else queries


def _convert(values: Array, dtype: jnp.dtype) -> Array:
    if values.dtype.itemsize == 1:  # not every version converts these to every type
        values = values.astype(jnp.float32)
    return values.astype(dtype)


def _matmul(left: Array, right: Array, *, contract_last: bool) -> Array:
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((1,), (1 if contract_last else 0,)), ((), ()))
    return lax.dot_general(
        left, right, dims, precision=precision, preferred_element_type=jnp.float32
    )


def _widen(values_YL: Array, width: int) -> Array:
    """The same value in each lane, in more lanes."""
    repeats = -(-width // LANES)
    return jnp.concatenate([values_YL] * repeats, axis=1)[:, :width] if repeats > 1 else values_YL
