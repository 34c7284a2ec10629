"""A step's list of work for the TPU kernels: made once a step, read by every layer.

Knows the step's layout and block sizes; knows neither layers (windows are theirs) nor contents.
Lists are flat int32 arrays, field after field, since a scalar memory pads rows to 128 words.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.api import StepLayout, TokenPlaces
from pallas_kernels.paged_attention.tuning import TABLE_CHUNK


class ItemField:
    """Places of an attention item's fields. An item is a block of queries of one sequence."""

    BLOCK = 0  # of the query array
    SLOT = 1  # row of the page table
    POSITION = 2  # in its sequence, of the block's first token (negative: before its start)
    FIRST = 3  # token of the block that is the sequence's first
    END = 4  # token of the block behind the sequence's last
    PAGE = 5  # that receives the new token (decodes)
    COUNT = 6


class WriteField:
    """Places of a write's fields. A write is of some rows of one page."""

    PAGE = 0
    ROW_BLOCK = 1  # of the page
    TOKEN = 2  # of the step, that goes to the first row (negative: before the step's first)
    FIRST = 3  # row that is written
    END = 4  # row behind the last that is written
    COUNT = 5


class Items(NamedTuple):
    """Attention items, and which core does which."""

    fields: Array  # int32 [COUNT * number of items]
    bounds: Array  # int32 [cores + 1]: a core's items are those between two bounds


class Writes(NamedTuple):
    """Rows of pages to write, likewise."""

    fields: Array
    bounds: Array


def decode_items(layout: StepLayout, places: TokenPlaces, *, num_cores: int) -> Items:
    """An item per sequence that has one token."""
    count = min(layout.slots_S.shape[0], places.page_T.shape[0])
    seqs = jnp.arange(count, dtype=jnp.int32)
    starts = layout.starts_S[:count]
    zeros, ones = jnp.zeros_like(seqs), jnp.ones_like(seqs)
    fields = [seqs, layout.slots_S[:count], starts, zeros, ones, places.page_T[:count]]
    keys = jnp.where(seqs < layout.num_decodes, starts + 1, 0)
    return Items(jnp.concatenate(fields), _shares(keys, seqs, layout.num_decodes, num_cores))


def chunk_items(layout: StepLayout, *, num_tokens: int, query_block: int, num_cores: int) -> Items:
    """An item per sequence with several tokens and block of `query_block` tokens that has some.

    Items of a block stand together; a block belongs to one core.
    """
    begins, ends, is_chunk = _chunks(layout)
    first_blocks = begins // query_block
    counts = jnp.where(is_chunk, (ends - 1) // query_block - first_blocks + 1, 0)
    num_items = -(-num_tokens // query_block) + layout.slots_S.shape[0]
    seq, nth, total = _spread(counts, num_items)
    block = first_blocks[seq] + nth
    first_token = block * query_block
    fields = [
        block,
        layout.slots_S[seq],
        layout.starts_S[seq] + first_token - begins[seq],
        jnp.maximum(begins[seq] - first_token, 0),
        jnp.minimum(ends[seq] - first_token, query_block),
        jnp.zeros_like(block),
    ]
    keys = fields[ItemField.POSITION] + fields[ItemField.END]
    is_real = jnp.arange(num_items, dtype=jnp.int32) < total
    bounds = _shares(jnp.where(is_real, keys, 0), block, total, num_cores)
    return Items(jnp.concatenate(fields), bounds)


def chunk_writes(
    layout: StepLayout, *, num_tokens: int, page_size: int, rows: int, num_cores: int
) -> Writes:
    """The writes of sequences with several tokens: `rows` rows each, all or part of them."""
    begins, ends, is_chunk = _chunks(layout)
    starts = layout.starts_S
    first_blocks = starts // rows
    last_blocks = (starts + ends - begins - 1) // rows
    counts = jnp.where(is_chunk, last_blocks - first_blocks + 1, 0)
    num_writes = num_tokens // rows + 2 * layout.slots_S.shape[0]
    seq, nth, total = _spread(counts, num_writes)
    block = first_blocks[seq] + nth
    column, row_block = jnp.divmod(block, page_size // rows)
    columns = layout.page_table_RM.shape[1]
    begin, end = starts[seq], starts[seq] + ends[seq] - begins[seq]
    fields = [
        layout.page_table_RM[layout.slots_S[seq], column.clip(max=columns - 1)],
        row_block,
        begins[seq] + block * rows - begin,
        jnp.maximum(begin - block * rows, 0),
        jnp.minimum(end - block * rows, rows),
    ]
    cores = jnp.arange(num_cores + 1, dtype=jnp.int32)
    return Writes(jnp.concatenate(fields), (total * cores) // num_cores)


def table_chunks(page_table_RM: Array) -> Array:
    """The page table cut so that a DMA can bring any `TABLE_CHUNK` entries: [R, N, 1, chunk].

    A table of 256 sequences of 128k tokens has 8 MiB: more than a scalar memory.
    """
    num_rows, num_columns = page_table_RM.shape
    spare = -num_columns % TABLE_CHUNK
    padded = jnp.pad(page_table_RM, ((0, 0), (0, spare)))
    return padded.reshape(num_rows, -1, 1, TABLE_CHUNK)


def _chunks(layout: StepLayout) -> tuple[Array, Array, Array]:
    """First and behind-last token of each sequence, and whether it has more than one."""
    seqs = jnp.arange(layout.slots_S.shape[0], dtype=jnp.int32)
    is_chunk = (seqs >= layout.num_decodes) & (seqs < layout.num_seqs)
    return layout.query_starts_S1[:-1], layout.query_starts_S1[1:], is_chunk


def _spread(counts_S: Array, length: int) -> tuple[Array, Array, Array]:
    """Sequence of each of `length` entries of which sequence s has counts_S[s], its number
    among them, and how many there are."""
    ends_S = jnp.cumsum(counts_S, dtype=jnp.int32)
    entries = jnp.arange(length, dtype=jnp.int32)
    seq = (entries[:, None] >= ends_S[None, :]).sum(axis=1, dtype=jnp.int32)
    seq = seq.clip(max=counts_S.shape[0] - 1)
    return seq, entries - (ends_S - counts_S)[seq], ends_S[-1]


def _shares(keys: Array, blocks: Array, total: Array, num_cores: int) -> Array:
    """Bounds that give each core about as many keys to read, and no block to two cores."""
    if num_cores == 1:
        return jnp.stack([jnp.int32(0), total])
    entries = jnp.arange(keys.shape[0], dtype=jnp.int32)
    counts = keys.astype(jnp.float32)
    sums = jnp.cumsum(counts)
    middles = sums - counts / 2
    starts_block = (entries == 0) | (blocks != jnp.roll(blocks, 1))
    bounds = [jnp.int32(0)]
    for core in range(1, num_cores):
        is_before = middles * num_cores <= sums[-1] * core
        may_start = starts_block & ~is_before & (entries < total)
        bound = jnp.where(may_start, entries, total).min()
        bounds.append(bound.astype(jnp.int32))
    return jnp.stack([*bounds, total])
