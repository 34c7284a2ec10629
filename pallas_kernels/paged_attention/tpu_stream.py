"""How pages stream past queries in the TPU attention kernel: its arguments, cursors and DMAs.

Knows what is where and when it may be overwritten; knows no arithmetic (tpu_attend.py).

Letters: those of api.py, and N blocks of queries, Y rows of one (group * tokens, tokens fastest),
X tokens of one, J pages of a block of keys, R rows of a page that are written together, W lanes of
a query.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.api import AttentionSpec
from pallas_kernels.paged_attention.tpu_work import ItemField
from pallas_kernels.paged_attention.tuning import TABLE_CHUNK

TABLE_BUFFERS = 4

Ref = Any
"""An array in some memory, inside the kernel. Pallas's references have no public type."""


@dataclass(frozen=True, kw_only=True)
class AttendConfig:
    """All that is static of one kernel; sizes of rings and query blocks are powers of two."""

    spec: AttentionSpec
    num_kv_heads: int
    group: int
    head_dim: int
    width: int  # lanes of a query, and of its output
    query_block: int  # tokens of a block of queries; 1: decodes, which write their own token
    rows: int  # of a block of queries: group * query_block, at least a tile
    page_size: int
    page_rows: int
    pages_per_block: int
    num_buffers: int  # blocks of keys in VMEM

    @property
    def is_decode(self) -> bool:
        return self.query_block == 1

    @property
    def keys(self) -> int:
        """Of a block."""
        return self.pages_per_block * self.page_size

    @property
    def num_query_buffers(self) -> int:
        """A decode is over so soon that one block ahead does not hide a DMA's latency."""
        return 4 if self.is_decode else 2


def in_hbm(array: Array) -> Array:
    """An argument of a kernel that XLA leaves where it is.

    Otherwise it brings what fits into VMEM: a small cache, whole, for a few pages. A BlockSpec's
    memory space says where the kernel finds an input, and binds XLA for outputs only.
    """
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


class Inputs(NamedTuple):
    """Of the kernel. The same tuple holds arrays and block specs outside of it."""

    items: Ref  # SMEM int32 [COUNT * items]
    bounds: Ref  # SMEM int32 [cores + 1]
    factors: Ref  # SMEM float32 [2 K]: of logits, in powers of two; of values
    sinks: Ref  # None or SMEM float32 [K G], in powers of two
    table: Ref  # HBM int32 [R, chunks, 1, TABLE_CHUNK]
    queries: Ref  # HBM [N, K, Y, W]; of chunks [K, G, T, W]
    new: Ref  # None or HBM float32 [N, K, 1, C]: a decode's own key and value
    pages: Ref  # HBM [P, K, B, C]


class Outputs(NamedTuple):
    """Of the kernel."""

    out: Ref  # HBM, like the queries
    pages: Ref  # None or HBM, the memory of the input


class Scratch(NamedTuple):
    """What a core keeps."""

    keys: Ref  # VMEM [buffers, J, K, B, C]
    table: Ref  # SMEM int32 [TABLE_BUFFERS, 1, TABLE_CHUNK]
    queries: Ref  # VMEM [query buffers, K, Y, W]; of chunks [query buffers, K, G, X, W]
    out: Ref  # VMEM, likewise
    new: Ref  # None or VMEM float32 [query buffers, K, 1, C]
    tails: Ref  # None or VMEM [query buffers, K, R, C]: on their way to pages
    max: Ref  # VMEM float32 [K, Y, LANES]: the softmax's running state
    sum: Ref  # VMEM float32 [K, Y, LANES]
    acc: Ref  # VMEM float32 [K, Y, W]
    keys_sems: Ref
    table_sems: Ref
    queries_sems: Ref
    out_sems: Ref


class Copy(Protocol):
    """A DMA, as `pltpu.make_async_copy` describes it."""

    def start(self) -> None: ...

    def wait(self) -> None: ...


class Cursor(NamedTuple):
    """A step, the unit of the stream: an item and a block of its sequence's keys."""

    step: Array  # steps before this one, for the rings
    item: Array
    block: Array


@dataclass(frozen=True)
class Stream:
    """The steps of some items in order, and the DMAs that belong to each."""

    config: AttendConfig
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch

    @property
    def pages(self) -> Ref:
        return self.inputs.pages if self.outputs.pages is None else self.outputs.pages

    # What an item says

    def field(self, item: Array, field: int) -> Array:
        """Behind the last item is no other; a cursor there reads the last and does nothing."""
        num_items = self.inputs.items.shape[0] // ItemField.COUNT
        return self.inputs.items[field * num_items + jnp.minimum(item, num_items - 1)]

    def query_block(self, item: Array) -> Array:
        return self.field(item, ItemField.BLOCK)

    def first_query(self, item: Array) -> Array:
        """Position of the item's first query in its sequence."""
        return self.field(item, ItemField.POSITION) + self.field(item, ItemField.FIRST)

    def num_keys(self, item: Array) -> Array:
        """Keys of the sequence up to the item's last query."""
        return self.field(item, ItemField.POSITION) + self.field(item, ItemField.END)

    def first_key(self, item: Array) -> Array:
        """The first key that a query of the item sees."""
        if self.config.spec.window is None:
            return jnp.int32(0)
        return jnp.maximum(self.first_query(item) - (self.config.spec.window - 1), 0)

    # Cursors

    def start(self, item: Array) -> Cursor:
        return Cursor(jnp.int32(0), item, div(self.first_key(item), self.config.keys))

    def next(self, at: Cursor) -> Cursor:
        is_last = self.is_last(at)
        first_block = div(self.first_key(at.item + 1), self.config.keys)
        return Cursor(
            at.step + 1,
            jnp.where(is_last, at.item + 1, at.item),
            jnp.where(is_last, first_block, at.block + 1),
        )

    def is_first(self, at: Cursor) -> Array:
        """Whether the step is its item's first."""
        return at.block == div(self.first_key(at.item), self.config.keys)

    def is_last(self, at: Cursor) -> Array:
        return (at.block + 1) * self.config.keys >= self.num_keys(at.item)

    # Pages, and the entries of the page table that name them

    def table_copy(self, at: Cursor) -> Copy:
        place = ring(at.step, TABLE_BUFFERS)
        chunk = div(at.block * self.config.pages_per_block, TABLE_CHUNK)
        return pltpu.make_async_copy(
            self.inputs.table.at[self.field(at.item, ItemField.SLOT), chunk],
            self.scratch.table.at[place],
            self.scratch.table_sems.at[place],
        )

    def start_table(self, at: Cursor, end: Array) -> None:
        @pl.when(at.item < end)
        def _() -> None:
            self.table_copy(at).start()

    def start_pages(self, at: Cursor, end: Array) -> None:
        @pl.when(at.item < end)
        def _() -> None:
            self.table_copy(at).wait()
            first = rem(at.block * self.config.pages_per_block, TABLE_CHUNK)

            def start(j: Array) -> None:
                page = self.scratch.table[ring(at.step, TABLE_BUFFERS), 0, first + j]
                self._page_copy(at, j, page).start()

            self._for_pages(at, start)

    def wait_for_pages(self, at: Cursor) -> None:
        self._for_pages(at, lambda j: self._page_copy(at, j, jnp.int32(0)).wait())

    def _for_pages(self, at: Cursor, do: Callable[[Array], None]) -> None:
        """Calls `do` with the place in the block of each page that a query sees some of."""
        first = at.block * self.config.pages_per_block
        begin = jnp.maximum(div(self.first_key(at.item), self.config.page_size) - first, 0)
        end = div(self.num_keys(at.item) + self.config.page_size - 1, self.config.page_size)
        end = jnp.minimum(end - first, self.config.pages_per_block)
        lax.fori_loop(begin, end, lambda j, _: do(j), None)

    def _page_copy(self, at: Cursor, j: Array, page: Array) -> Copy:
        place = ring(at.step, self.config.num_buffers)
        return pltpu.make_async_copy(
            self.pages.at[page], self.scratch.keys.at[place, j], self.scratch.keys_sems.at[place]
        )

    def clear_pages(self) -> None:
        """Places that no page was read to yet must be finite, like those that one was: a weight
        of zero does not undo NaN. What follows a sequence's end is cleared when it is read."""
        keys = self.scratch.keys

        def clear(place: Array, _: None) -> None:
            keys[place] = jnp.zeros(keys.shape[1:], keys.dtype)

        lax.fori_loop(0, self.config.num_buffers, clear, None)

    # Blocks of queries and what comes of them: one place in all rings

    def start_queries(self, block: Array, last_block: Array) -> None:
        @pl.when(block <= last_block)
        def _() -> None:
            for copy in self._query_copies(block):
                copy.start()

    def wait_for_queries(self, block: Array) -> None:
        for copy in self._query_copies(block):
            copy.wait()

    def _query_copies(self, block: Array) -> Sequence[Copy]:
        inputs, scratch = self.inputs, self.scratch
        place = ring(block, self.config.num_query_buffers)
        sem = scratch.queries_sems.at[place]
        queries = self._block_of(inputs.queries, block)
        copies = [pltpu.make_async_copy(queries, scratch.queries.at[place], sem)]
        if inputs.new is not None and scratch.new is not None:
            copies.append(pltpu.make_async_copy(inputs.new.at[block], scratch.new.at[place], sem))
        return copies

    def _block_of(self, array: Ref, block: Array) -> Ref:
        """A block of queries, or of outputs."""
        if self.config.is_decode:
            return array.at[block]
        return array.at[:, :, tile_rows(block, self.config.query_block), :]

    def start_out(self, block: Array) -> None:
        self._out_copy(block).start()

    def start_tail(self, block: Array) -> None:
        self._tail_copy(block).start()

    def wait_for_out(self, block: Array, first_block: Array) -> None:
        """Until the block's place in the rings is free again; none precedes the first."""

        @pl.when(block >= first_block)
        def _() -> None:
            self._out_copy(block).wait()
            if self.config.is_decode:
                self._tail_copy(block).wait()

    def _out_copy(self, block: Array) -> Copy:
        place = ring(block, self.config.num_query_buffers)
        out, sem = self._block_of(self.outputs.out, block), self.scratch.out_sems.at[place]
        return pltpu.make_async_copy(self.scratch.out.at[place], out, sem)

    def _tail_copy(self, block: Array) -> Copy:
        """Of the rows around a decode's new token to their page; its item is its block."""
        assert self.scratch.tails is not None
        config, place = self.config, ring(block, self.config.num_query_buffers)
        tile = div(rem(self.num_keys(block) - 1, config.page_size), config.page_rows)
        page = self.field(block, ItemField.PAGE)
        return pltpu.make_async_copy(
            self.scratch.tails.at[place],
            self.pages.at[page, :, tile_rows(tile, config.page_rows), :],
            self.scratch.out_sems.at[place],
        )


def tile_rows(tile: Array, rows: int) -> pl.Slice | slice:
    """The rows of a tile, so that the compiler sees that they are aligned."""
    return pl.ds(pl.multiple_of(tile * rows, rows), rows)


def ring(count: Array, size: int) -> Array:
    """Place in a ring of a power of two."""
    return count & (size - 1)


def div(value: Array, divisor: int) -> Array:
    """Of integers that are not negative: fewer instructions than Python's."""
    return lax.div(value, jnp.int32(divisor))


def rem(value: Array, divisor: int) -> Array:
    """See `div`."""
    return lax.rem(value, jnp.int32(divisor))
