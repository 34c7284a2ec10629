"""Block sizes of the TPU kernels, from a roofline of the device and the shapes of a layer.

Knows the device table and what the kernels keep in VMEM; knows no arrays. Rules, not tables: a
peer's table of tuned sizes has thousands of lines and none for the shape at hand.

1. Memory is busy when `bandwidth * latency` bytes are on their way (Little's law): the ring of
   key blocks holds at least so much besides the block that is computed on.
2. A block of keys is so long that reading it takes several times what a turn of the loop costs
   the scalar core, and no longer: what is read behind a short sequence's end is lost.
3. A block of queries has as many rows as make the matrix units the bound: reading a key once
   serves 4 * rows * head_dim flops, so `rows >= flops / bandwidth` for 16-bit keys.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from pallas_kernels.devices import TpuSpec

LANES = 128
_SUBLANES = 8
TABLE_CHUNK = LANES
"""Page-table entries that are fetched together."""

_TURN_S = 1e-6  # reading a block of keys should take so long
_LONGEST_BLOCK = 1024  # keys
_SHORTEST_BLOCK = LANES  # keys: a row of logits fills the lanes
_MOST_LOGITS = 2**17  # of a block of a chunk: their code is unrolled, 1 MiB of it for 2**19
SMALLEST_QUERY_BLOCK = 16  # tokens: whole tiles of 16-bit rows
_LARGEST_QUERY_BLOCK = 128
_PAGE_DMA_S = 40e-9  # what starting one DMA costs the scalar core
_TURN_VALUES = 4  # blocks of logits that a turn keeps in VMEM: logits, weights, mask, one more


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What the kernels need to know of a model's attention layers, on one device."""

    num_kv_heads: int
    group: int  # query heads per kv head
    head_dim: int
    query_dtype: str
    page_dtype: str
    page_size: int

    @property
    def key_bytes(self) -> int:
        """Of one token in the cache of one layer."""
        return 2 * self.head_dim * self.num_kv_heads * jnp.dtype(self.page_dtype).itemsize

    @property
    def page_rows(self) -> int:
        """Rows of a page that are written together: a whole number of tiles of any layout."""
        return 32 // jnp.dtype(self.page_dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class TpuBlocks:
    """Sizes the kernels are compiled with."""

    pages_per_block: int  # of decodes
    chunk_pages_per_block: int
    num_buffers: int  # blocks of keys in VMEM
    query_block: int  # tokens of a block of a prefill chunk
    num_cores: int
    vmem_limit_bytes: int

    def describe(self, shape: AttentionShape) -> str:
        """In words, for a log."""
        keys = self.pages_per_block * shape.page_size
        ring_mib = self.num_buffers * keys * shape.key_bytes / 2**20
        return (
            f"{self.num_buffers} blocks of {keys} keys on their way ({ring_mib:.1f} MiB), "
            f"chunks in blocks of {self.query_block} tokens, {self.num_cores} core(s)"
        )


def refusal(shape: AttentionShape) -> str | None:
    """Why the TPU kernels do not take a shape; None: they do."""
    if shape.head_dim % 64:
        return f"head size {shape.head_dim} is no multiple of 64"
    if shape.query_dtype not in ("float32", "bfloat16"):
        return f"queries are {shape.query_dtype}, not float32 or bfloat16"
    if shape.page_dtype not in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
        return f"pages are {shape.page_dtype}, not float32, bfloat16, int8 or float8_e4m3fn"
    if shape.page_size % shape.page_rows:
        return (
            f"pages of {shape.page_size} tokens are no multiple of {shape.page_rows}, "
            f"the rows of a tile of {shape.page_dtype}"
        )
    return None


def choose_blocks(device: TpuSpec, shape: AttentionShape) -> TpuBlocks | None:
    """The sizes for a device and a shape, or None where the smallest do not fit its VMEM;
    `refusal` is None."""
    budget = device.vmem_bytes * 3 // 4
    bytes_per_s = device.hbm_bytes_per_s / device.num_cores
    pages = _pages_of(int(bytes_per_s * _TURN_S / shape.key_bytes), shape)
    num_buffers = 4
    while (num_buffers - 1) * pages * shape.page_size * shape.key_bytes < (
        bytes_per_s * device.dma_latency_s
    ):
        num_buffers *= 2
    ridge = device.flops_bf16_per_s / device.hbm_bytes_per_s
    queries = SMALLEST_QUERY_BLOCK
    while queries < _LARGEST_QUERY_BLOCK and queries * shape.group < ridge:
        queries *= 2
    while True:
        chunk_pages = min(pages, _pages_of(_MOST_LOGITS // (queries * shape.group), shape))
        blocks = TpuBlocks(
            pages_per_block=pages,
            chunk_pages_per_block=chunk_pages,
            num_buffers=num_buffers,
            query_block=queries,
            num_cores=device.num_cores,
            vmem_limit_bytes=device.vmem_bytes,
        )
        needed = vmem_bytes(shape, blocks)
        if needed <= budget:
            return replace(blocks, vmem_limit_bytes=min(needed * 5 // 4, device.vmem_bytes))
        if num_buffers > 4:
            num_buffers //= 2
        elif queries > 2 * SMALLEST_QUERY_BLOCK:
            queries //= 2
        elif num_buffers > 2:
            num_buffers //= 2
        elif pages > _pages_of(0, shape):
            pages //= 2
        elif queries > SMALLEST_QUERY_BLOCK:
            queries //= 2
        else:
            return None


def vmem_bytes(shape: AttentionShape, blocks: TpuBlocks) -> int:
    """What the hungrier kernel keeps in VMEM: the ring, queries, outputs, state, logits."""

    def needed(pages: int, rows: int, num_query_buffers: int) -> int:
        width, query_bytes = lane_width(shape.head_dim), jnp.dtype(shape.query_dtype).itemsize
        keys = pages * shape.page_size
        ring = blocks.num_buffers * keys * shape.key_bytes
        block = shape.num_kv_heads * rows
        queries_and_outputs = 2 * num_query_buffers * block * width * query_bytes
        state = block * (width + 2 * LANES) * 4
        return ring + queries_and_outputs + state + _TURN_VALUES * 4 * rows * keys

    tails = 4 * shape.num_kv_heads * 2 * shape.head_dim * 4 * (_SUBLANES + shape.page_rows)
    decode = tails + needed(blocks.pages_per_block, -(-shape.group // _SUBLANES) * _SUBLANES, 4)
    chunk = needed(blocks.chunk_pages_per_block, shape.group * blocks.query_block, 2)
    return max(decode, chunk)


def lane_width(head_dim: int) -> int:
    """Lanes of a query and of its output: for heads that fill no whole register, key and value
    are multiplied together and half of the result is dropped, which costs a matrix unit
    nothing."""
    return head_dim if head_dim % LANES == 0 else 2 * head_dim


def best_page_size(device: TpuSpec, shape: AttentionShape) -> int:
    """Tokens per page so that starting a page's DMA is quicker than the DMA (16 to 256)."""
    wanted = device.hbm_bytes_per_s / device.num_cores * _PAGE_DMA_S / shape.key_bytes
    page_size = max(16, shape.page_rows)
    while page_size < wanted and page_size < 256:
        page_size *= 2
    return page_size


def _pages_of(keys: int, shape: AttentionShape) -> int:
    """Pages of a block of up to so many keys: a power of two, and of allowed length."""
    pages, size = 1, shape.page_size
    while pages * size < _SHORTEST_BLOCK or 2 * pages * size <= min(keys, _LONGEST_BLOCK):
        pages *= 2
    return min(pages, TABLE_CHUNK)
