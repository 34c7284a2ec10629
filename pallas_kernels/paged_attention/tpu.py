"""Ragged paged attention for TPUs (Pallas, Mosaic): the op and its plan.

Knows how a step is laid out for the kernels; knows no device: sizes come from tuning.py, which is
given one. What runs is up to three kernels, each over a list of work made once a step
(tpu_work.py):

1. *Decodes* (tpu_attend.py). An item is a sequence. Its newest key and value are merged into the
   last page where it lies in VMEM, attended to, and written back as one tile: a decode reads each
   of its pages once, and writes no more than the tiling of the memory asks for.
2. *Writes of prefill chunks* (tpu_write.py), then
3. *chunks* (tpu_attend.py again). An item is a block of queries of one sequence; blocks are cut
   at multiples of their size, so that a block may hold the end of one sequence and the beginning
   of the next: two items, which store their own rows.

A step of decodes alone is the first kernel alone. Chunks are bound by arithmetic, so writing
their keys first and reading them again is cheap, and no order between blocks is to be kept.

*Pages.* A page [K, B, 2H] comes by one DMA into a ring of blocks of J pages. The DMAs run a whole
ring ahead of the computation, through ends of sequences, since three cursors walk one list. Page
tables stay in HBM (256 sequences of 128k tokens are 8 MiB, scalar memory is 1 MiB); the entries a
block needs come by a DMA of their own, further ahead. With a window, blocks and pages before it
are skipped. Pages are changed in place: the kernels' output is their input's memory.

*Shapes.* Queries are [N, K, Y, W]: the Y rows of a (block, kv head) are a whole operand of a matrix
product, for decodes the group's heads, for chunks group times tokens. A page of a head is
[B, 2H], whole tiles for every head size from 64. For H = 64 queries are padded with zeros to the
lanes they would fill anyway, and multiply keys and values at once; see attend_head.

*Two cores* with one memory (v4, v5p) are a parallel grid dimension; items are shared by keys.

*Races.* A page is written by one item, after that item's read of it, or in the kernel before. No
other sequence reads it: pages are shared when they are full. The interpreter's detector agrees.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionBatch,
    AttentionParams,
    AttentionSpec,
    PagedAttention,
    PlanAttention,
    StepLayout,
    TokenPlaces,
)
from pallas_kernels.paged_attention.quantized import rows_to_store
from pallas_kernels.paged_attention.tpu_call import AttendCall, Interpret
from pallas_kernels.paged_attention.tpu_work import (
    Items,
    Writes,
    chunk_items,
    chunk_writes,
    decode_items,
    table_chunks,
)
from pallas_kernels.paged_attention.tpu_write import write_chunks
from pallas_kernels.paged_attention.tuning import (
    SMALLEST_QUERY_BLOCK,
    AttentionShape,
    TpuBlocks,
    lane_width,
)

_SUBLANES = 8


def make_plan(shape: AttentionShape, blocks: TpuBlocks) -> PlanAttention:
    """The plan for layers of a shape.

    `work` is the decodes' items, the page table in chunks and, in a step that may have them, the
    chunks' items and writes.
    """

    def plan(layout: StepLayout, places: TokenPlaces, *, decode_only: bool) -> AttentionBatch:
        num_tokens = places.page_T.shape[0]
        work = [
            *decode_items(layout, places, num_cores=blocks.num_cores),
            table_chunks(layout.page_table_RM),
        ]
        if not decode_only:
            work += chunk_items(
                layout,
                num_tokens=num_tokens,
                query_block=_query_block(blocks, num_tokens),
                num_cores=blocks.num_cores,
            )
            work += chunk_writes(
                layout,
                num_tokens=num_tokens,
                page_size=shape.page_size,
                rows=shape.page_rows,
                num_cores=blocks.num_cores,
            )
        return AttentionBatch(
            layout=layout, places=places, work=tuple(work), decode_only=decode_only
        )

    return plan


def make_paged_attention(
    shape: AttentionShape, blocks: TpuBlocks, *, interpret: Interpret = False
) -> PagedAttention:
    """The op for layers of a shape; `batch` comes from `make_plan` of the same arguments."""

    def paged_attention(
        q_TKGH: Array,
        k_TKH: Array,
        v_TKH: Array,
        pages_PKBC: Array,
        batch: AttentionBatch,
        spec: AttentionSpec,
        params: AttentionParams = NO_PARAMS,
    ) -> tuple[Array, Array]:
        num_tokens, num_kv, group, head_dim = q_TKGH.shape
        assert (num_kv, group, head_dim) == (shape.num_kv_heads, shape.group, shape.head_dim)
        assert pages_PKBC.shape[1:] == (num_kv, shape.page_size, 2 * head_dim)
        layout = batch.layout
        call = AttendCall(
            spec=spec,
            params=params,
            shape=shape,
            blocks=blocks,
            table=batch.work[2],
            interpret=interpret,
        )
        # As stored, in 32 bits: rows of 32 bits can be moved to where they belong.
        kv_TKC = rows_to_store(k_TKH, v_TKH, params, pages_PKBC.dtype).astype(jnp.float32)
        num_first = min(num_tokens, layout.slots_S.shape[0])  # all decodes are among them
        q_NKYW = _decode_queries(q_TKGH[:num_first], shape)
        out_NKYW, pages_PKBC = call.decodes(
            q_NKYW, kv_TKC[:num_first, :, None], pages_PKBC, Items(*batch.work[:2])
        )
        is_decode_T = jnp.arange(num_tokens) < layout.num_decodes
        decoded_TKGH = _head_lanes(out_NKYW[:, :, :group], shape)
        if batch.decode_only:
            return _select(is_decode_T, decoded_TKGH, jnp.zeros_like(decoded_TKGH)), pages_PKBC

        pages_PKBC = write_chunks(
            kv_TKC,
            pages_PKBC,
            Writes(*batch.work[5:7]),
            rows=shape.page_rows,
            num_cores=blocks.num_cores,
            interpret=interpret,
        )
        query_block = _query_block(blocks, num_tokens)
        q_NKYW = _chunk_queries(q_TKGH, shape, query_block)
        out_NKYW = call.chunks(q_NKYW, pages_PKBC, Items(*batch.work[3:5]), query_block=query_block)
        out_TKGH = _chunk_outputs(out_NKYW, shape, query_block)[:num_tokens]
        spare = ((0, num_tokens - num_first), (0, 0), (0, 0), (0, 0))
        is_real_T = jnp.arange(num_tokens) < layout.query_starts_S1[layout.num_seqs]
        out_TKGH = _select(is_real_T, out_TKGH, jnp.zeros_like(out_TKGH))
        return _select(is_decode_T, jnp.pad(decoded_TKGH, spare), out_TKGH), pages_PKBC

    return paged_attention


def _query_block(blocks: TpuBlocks, num_tokens: int) -> int:
    """Tokens of a block of queries, in a step of so many tokens."""
    size = blocks.query_block
    while size // 2 >= max(num_tokens, SMALLEST_QUERY_BLOCK):
        size //= 2
    return size


def _decode_queries(q_TKGH: Array, shape: AttentionShape) -> Array:
    """A block of queries is a token: its group, filled up to a tile's rows."""
    q_NKYH = jnp.pad(q_TKGH, ((0, 0), (0, 0), (0, -shape.group % _SUBLANES), (0, 0)))
    return _to_lanes(q_NKYH, shape)


def _chunk_queries(q_TKGH: Array, shape: AttentionShape, query_block: int) -> Array:
    """Blocks of consecutive tokens, each head's together: row g * query_block + token."""
    num_kv, group, head_dim = q_TKGH.shape[1:]
    q_TKGH = jnp.pad(q_TKGH, ((0, -q_TKGH.shape[0] % query_block), (0, 0), (0, 0), (0, 0)))
    q_NXKGH = q_TKGH.reshape(-1, query_block, num_kv, group, head_dim)
    q_NKGXH = q_NXKGH.transpose(0, 2, 3, 1, 4)
    return _to_lanes(q_NKGXH.reshape(-1, num_kv, group * query_block, head_dim), shape)


def _chunk_outputs(out_NKYW: Array, shape: AttentionShape, query_block: int) -> Array:
    """The inverse: [T, K, G, H], T a multiple of the block."""
    num_blocks, num_kv = out_NKYW.shape[:2]
    out_NKYH = _head_lanes(out_NKYW, shape)
    out_NKGXH = out_NKYH.reshape(num_blocks, num_kv, shape.group, query_block, shape.head_dim)
    out_NXKGH = out_NKGXH.transpose(0, 3, 1, 2, 4)
    return out_NXKGH.reshape(-1, num_kv, shape.group, shape.head_dim)


def _to_lanes(q_NKYH: Array, shape: AttentionShape) -> Array:
    spare = lane_width(shape.head_dim) - shape.head_dim
    return jnp.pad(q_NKYH, ((0, 0), (0, 0), (0, 0), (0, spare)))


def _head_lanes(out_NKYW: Array, shape: AttentionShape) -> Array:
    """The lanes of the output that are the weighted values; see attend_head."""
    return out_NKYW[..., lane_width(shape.head_dim) - shape.head_dim :]


def _select(is_chosen_T: Array, chosen_TKGH: Array, other_TKGH: Array) -> Array:
    return jnp.where(is_chosen_T[:, None, None, None], chosen_TKGH, other_TKGH)
