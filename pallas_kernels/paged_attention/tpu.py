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

*Shapes.* Queries of decodes are [N, K, Y, W]: the Y rows of a (block, kv head), the group's heads,
are a whole operand of a matrix product. Those of chunks, their outputs and all new keys and values
are [.., K, T, ..]: so XLA has the projection write them, and the next one read them, without an
operation to turn them; the copies of blocks put them in the products' order. A page of a head is
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
        kv_TKC = rows_to_store(k_TKH, v_TKH, params, pages_PKBC.dtype)
        num_first = min(num_tokens, layout.slots_S.shape[0])  # all decodes are among them
        q_NKYW = _decode_queries(q_TKGH[:num_first], shape)
        out_NKYW, pages_PKBC = call.decodes(
            q_NKYW,
            kv_TKC[:num_first, :, None].astype(jnp.float32),
            pages_PKBC,
            Items(*batch.work[:2]),
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
        q_TKGW = _to_lanes(_whole_blocks(q_TKGH, query_block), shape)
        out_KGTW = call.chunks(
            q_TKGW.transpose(1, 2, 0, 3),
            pages_PKBC,
            Items(*batch.work[3:5]),
            query_block=query_block,
        )
        out_TKGH = _head_lanes(out_KGTW.transpose(2, 0, 1, 3), shape)[:num_tokens]
        # In place, and what is left for all rows is a part of the product that reads them.
        first_TKGH = _select(is_decode_T[:num_first], decoded_TKGH, out_TKGH[:num_first])
        out_TKGH = out_TKGH.at[:num_first].set(first_TKGH)
        is_real_T = jnp.arange(num_tokens) < layout.query_starts_S1[layout.num_seqs]
        return _select(is_real_T, out_TKGH, jnp.zeros_like(out_TKGH)), pages_PKBC

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


def _whole_blocks(values: Array, size: int) -> Array:
    """[T, ...] with zeros behind, T a multiple of `size`."""
    spare = ((0, -values.shape[0] % size),) + ((0, 0),) * (values.ndim - 1)
    return jnp.pad(values, spare)


def _to_lanes(queries: Array, shape: AttentionShape) -> Array:
    """[..., H] -> [..., W]."""
    spare = lane_width(shape.head_dim) - shape.head_dim
    return jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, spare)))


def _head_lanes(outputs: Array, shape: AttentionShape) -> Array:
    """The lanes of the output that are the weighted values, [..., W] -> [..., H]; see
    attend_head."""
    return outputs[..., lane_width(shape.head_dim) - shape.head_dim :]


def _select(is_chosen_T: Array, chosen_TKGH: Array, other_TKGH: Array) -> Array:
    return jnp.where(is_chosen_T[:, None, None, None], chosen_TKGH, other_TKGH)
