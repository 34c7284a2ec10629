"""Calls of the TPU attention kernel: which array goes where, and what it costs.

Knows Pallas's calling conventions; knows neither the step's layout (tpu.py) nor what the kernel
does (tpu_attend.py).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.api import AttentionParams, AttentionSpec
from pallas_kernels.paged_attention.quantized import logit_scale_K, value_scale_K
from pallas_kernels.paged_attention.tpu_attend import LOG2_E, attend_kernel, scratch_of
from pallas_kernels.paged_attention.tpu_stream import AttendConfig, Inputs, in_hbm
from pallas_kernels.paged_attention.tpu_work import Items
from pallas_kernels.paged_attention.tuning import AttentionShape, TpuBlocks, lane_width

Interpret = pltpu.InterpretParams | bool
"""False compiles for a TPU; the others run anywhere, slowly."""


@dataclass(frozen=True, kw_only=True)
class AttendCall:
    """What the two calls of a layer share."""

    spec: AttentionSpec
    params: AttentionParams
    shape: AttentionShape
    blocks: TpuBlocks
    table: Array  # tpu_work.table_chunks
    interpret: Interpret

    def decodes(
        self, q_NKYW: Array, new_NK1C: Array, pages_PKBC: Array, items: Items
    ) -> tuple[Array, Array]:
        """[N, K, Y, W] and the pages, changed in place; `new` is stored values as float32."""
        inputs = self._inputs(q_NKYW, new_NK1C, pages_PKBC, items)
        out_NKYW, pages_PKBC = self._attend(inputs, query_block=1)
        return out_NKYW, pages_PKBC

    def chunks(self, q_KGTW: Array, pages_PKBC: Array, items: Items, *, query_block: int) -> Array:
        """[K, G, T, W], T a multiple of the block; the pages have all keys and values already.

        Rows that are no chunk's hold anything.
        """
        inputs = self._inputs(q_KGTW, None, pages_PKBC, items)
        (out_KGTW,) = self._attend(inputs, query_block=query_block)
        return out_KGTW

    def _attend(self, inputs: Inputs, *, query_block: int) -> list[Array]:
        config = self._config(inputs, query_block=query_block)
        return _attend(inputs, config=config, blocks=self.blocks, interpret=self.interpret)

    def _inputs(
        self, queries: Array, new_NK1C: Array | None, pages_PKBC: Array, items: Items
    ) -> Inputs:
        sinks_KG = self.params.sinks_KG
        return Inputs(
            items=items.fields,
            bounds=items.bounds,
            factors=self._factors(),
            sinks=None if sinks_KG is None else sinks_KG.astype(jnp.float32).reshape(-1) * LOG2_E,
            table=self.table,
            queries=queries,
            new=new_NK1C,
            pages=pages_PKBC,
        )

    def _factors(self) -> Array:
        """Of logits (to powers of two, or to parts of the cap) and of values, for each kv head."""
        num_kv, cap = self.shape.num_kv_heads, self.spec.soft_cap
        logits_K = logit_scale_K(self.spec.scale, self.params, num_kv)
        logits_K *= LOG2_E if cap is None else 1 / cap
        return jnp.concatenate([logits_K, value_scale_K(self.params, num_kv)])

    def _config(self, inputs: Inputs, *, query_block: int) -> AttendConfig:
        blocks, is_decode = self.blocks, query_block == 1
        return AttendConfig(
            spec=self.spec,
            num_kv_heads=self.shape.num_kv_heads,
            group=self.shape.group,
            head_dim=self.shape.head_dim,
            width=lane_width(self.shape.head_dim),
            query_block=query_block,
            rows=inputs.queries.shape[2] if is_decode else self.shape.group * query_block,
            page_size=self.shape.page_size,
            page_rows=self.shape.page_rows,
            pages_per_block=(blocks.pages_per_block if is_decode else blocks.chunk_pages_per_block),
            num_buffers=blocks.num_buffers,
        )


# Jitted, so that layers of the same shape are traced and lowered once.
@partial(jax.jit, static_argnames=("config", "blocks", "interpret"))
def _attend(
    inputs: Inputs, *, config: AttendConfig, blocks: TpuBlocks, interpret: Interpret
) -> list[Array]:
    """The output, like the queries, and, of decodes, the pages."""
    inputs = inputs._replace(pages=in_hbm(inputs.pages), table=in_hbm(inputs.table))
    queries, pages = inputs.queries, inputs.pages
    smem, anywhere = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    specs = Inputs(
        items=smem,
        bounds=smem,
        factors=smem,
        sinks=None if inputs.sinks is None else smem,
        table=hbm,
        queries=anywhere,
        new=None if inputs.new is None else anywhere,
        pages=hbm,
    )
    outputs, aliases = [jax.ShapeDtypeStruct(queries.shape, queries.dtype)], {}
    if config.is_decode:
        outputs.append(jax.ShapeDtypeStruct(pages.shape, pages.dtype))
        aliases = {len(jax.tree.leaves(inputs)) - 1: 1}  # pages come last
    scratch = scratch_of(config, query_dtype=queries.dtype, page_dtype=pages.dtype)
    return pl.pallas_call(
        partial(attend_kernel, config),
        grid=(blocks.num_cores,),
        in_specs=[specs],
        out_specs=[anywhere, hbm][: len(outputs)],
        out_shape=outputs,
        scratch_shapes=(scratch,),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if blocks.num_cores > 1 else "arbitrary",),
            vmem_limit_bytes=blocks.vmem_limit_bytes,
        ),
        cost_estimate=_cost(inputs, config),
        interpret=interpret,
        name="attend_to_pages_decodes" if config.is_decode else "attend_to_pages_chunks",
    )(inputs)


def _cost(inputs: Inputs, config: AttendConfig) -> pl.CostEstimate:
    """An upper bound, for XLA's scheduler, which compiles for any contents of a step: each block
    of queries sees as many keys as a row of the page table has, and decodes share no pages."""
    num_blocks = inputs.queries.shape[0]
    if not config.is_decode:
        num_blocks = inputs.queries.shape[2] // config.query_block
    num_columns = inputs.table.shape[1] * inputs.table.shape[3]
    num_pages = inputs.pages.shape[0]
    read = num_blocks * min(num_columns, num_pages)
    if config.is_decode:
        read = min(read, num_pages)
    products = read * config.page_size * config.num_kv_heads * config.rows
    page_bytes = inputs.pages.size // num_pages * inputs.pages.dtype.itemsize
    queries = inputs.queries.size * inputs.queries.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * products * config.width,
        transcendentals=products,
        bytes_accessed=read * page_bytes + 2 * queries,
    )
