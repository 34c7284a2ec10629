"""Ragged paged attention for GPUs: the op and its plan, over one of three implementations.

Knows what the others cover, not how they work; looks no device up. What runs:

1. The step's keys and values are scattered into their pages by XLA, in place when the pages are
   donated (a few kilobytes a sequence: no kernel of ours would be faster than its launch).
2. Decodes: gpu_decode.py and gpu_combine.py (Mosaic GPU, Hopper), or gpu_triton.py.
3. Prefill chunks: gpu_prefill.py (Mosaic GPU, Hopper), or gpu_triton.py.

Lists of work are those of gpu_work.py, made in the plan. Pages they do not cover (a type of
element, a page size) are left to Triton, then to xla.py; gpu_choice.py says what in words.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention import gpu_decode, gpu_prefill, gpu_triton, gpu_work, xla
from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionBatch,
    AttentionParams,
    AttentionSpec,
    StepLayout,
    TokenPlaces,
)
from pallas_kernels.paged_attention.gpu_choice import GpuSpec, why_not_for
from pallas_kernels.paged_attention.gpu_combine import combine
from pallas_kernels.paged_attention.gpu_mosaic import LOG2_E, ROWS, KernelSpec
from pallas_kernels.paged_attention.gpu_work import DecodeSplits, PrefillBlocks
from pallas_kernels.paged_attention.quantized import (
    logit_scale_K,
    rows_to_store,
    value_scale_K,
)
from pallas_kernels.paged_attention.tuning import AttentionShape

Dialect = Literal["mosaic_gpu", "triton"]
SMEM_BYTES = 224 * 1024  # of the 227 KiB that a Hopper block may have; the rest is for barriers
KEY_BLOCKS: Mapping[str, Mapping[int, int]] = MappingProxyType(
    {"decode": {64: 64, 128: 64, 256: 64}, "prefill": {64: 128, 128: 128, 256: 64}}
)
"""Keys multiplied at a time by Mosaic's kernels, by head size."""
MAX_SLOTS = 8


@dataclass(frozen=True, kw_only=True)
class GpuAttention:
    """The op for heads of one shape: `plan` and `attend` are what api.py calls its protocols.

    Layers whose heads have another shape are served as well; their lists of work are made by each
    of them again.
    """

    dialect: Dialect
    device: GpuSpec
    shape: AttentionShape  # per device
    # To run without a GPU: Mosaic's InterpretGPUParams, or True for Triton.
    interpret: Any = None

    def plan(self, layout: StepLayout, places: TokenPlaces, *, decode_only: bool) -> AttentionBatch:
        """See api.PlanAttention."""
        num_tokens = places.seq_T.shape[0]
        work = self._make_work(layout, num_tokens=num_tokens, decode_only=decode_only)
        return AttentionBatch(layout=layout, places=places, work=work, decode_only=decode_only)

    def attend(
        self,
        q_TKGH: Array,
        k_TKH: Array,
        v_TKH: Array,
        pages_PKBC: Array,
        batch: AttentionBatch,
        spec: AttentionSpec,
        params: AttentionParams = NO_PARAMS,
    ) -> tuple[Array, Array]:
        """See api.PagedAttention."""
        mine = replace(self, shape=_shape_of(q_TKGH, pages_PKBC))
        if not mine._covers(pages_PKBC):
            mine = replace(mine, dialect="triton")
        if not mine._covers(pages_PKBC):
            plain = xla.plan(batch.layout, batch.places, decode_only=batch.decode_only)
            return xla.paged_attention(q_TKGH, k_TKH, v_TKH, pages_PKBC, plain, spec, params)
        work = batch.work
        if mine != self:
            work = mine._make_work(
                batch.layout, num_tokens=q_TKGH.shape[0], decode_only=batch.decode_only
            )
        kv_TKC = rows_to_store(k_TKH, v_TKH, params, pages_PKBC.dtype)
        places = batch.places
        pages_PKBC = pages_PKBC.at[places.page_T, :, places.offset_T].set(kv_TKC, mode="drop")
        out_TKGH = _attend(q_TKGH, pages_PKBC, batch.layout, work, params, how=mine, spec=spec)
        return out_TKGH, pages_PKBC

    def _covers(self, pages_PKBC: Array) -> bool:
        if why_not_for(self.dialect, self.shape) is not None:
            return False
        # Triton's offsets have 32 bits below 4 GiB.
        return self.dialect != "triton" or pages_PKBC.itemsize > 1 or pages_PKBC.size < 2**31

    def _make_work(
        self, layout: StepLayout, *, num_tokens: int, decode_only: bool
    ) -> tuple[Array, ...]:
        at_once = max(1, self.device.num_cores // self.shape.num_kv_heads)
        splits = gpu_work.split_decodes(layout, blocks_at_once=at_once)
        if decode_only:
            return tuple(splits)
        blocks = gpu_work.block_prefills(
            layout, num_tokens=num_tokens, tokens_per_block=self._tokens_per_block
        )
        return (*splits, *blocks)

    @property
    def _tokens_per_block(self) -> int:
        if self.dialect == "triton":
            return gpu_triton.tokens_per_tile(self.shape.group)
        tokens = gpu_prefill.tokens_per_tile(self.shape.group)
        return num_consumers(self.shape.head_dim) * tokens


def num_consumers(head_dim: int) -> int:
    """Attending warpgroups: what shared memory has room for."""
    return 2 if head_dim <= 128 else 1


def _shape_of(q_TKGH: Array, pages_PKBC: Array) -> AttentionShape:
    num_kv_heads, group, head_dim = q_TKGH.shape[1:]
    return AttentionShape(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        query_dtype=q_TKGH.dtype.name,
        page_dtype=pages_PKBC.dtype.name,
        page_size=pages_PKBC.shape[2],
    )


@partial(jax.jit, static_argnames=("how", "spec"))
def _attend(
    q_TKGH: Array,
    pages_PKBC: Array,
    layout: StepLayout,
    work: tuple[Array, ...],
    params: AttentionParams,
    *,
    how: GpuAttention,
    spec: AttentionSpec,
) -> Array:
    """Attention over pages that have the step's keys; jitted, so that layers share a lowering."""
    num_tokens, num_heads = q_TKGH.shape[:2]
    num_seqs = layout.slots_S.shape[0]
    scale2_K = logit_scale_K(spec.scale, params, num_heads) * LOG2_E
    blocks = PrefillBlocks(*work[3:]) if len(work) > 3 else None
    inputs = _Inputs(layout, DecodeSplits(*work[:3]), blocks, scale2_K, params.sinks_KG)
    attend = _attend_mosaic if how.dialect == "mosaic_gpu" else _attend_triton
    out_SKGH, out_TKGH = attend(q_TKGH, pages_PKBC, inputs, how=how, spec=spec)
    if out_TKGH is None:
        out_TKGH = out_SKGH
    else:
        spare = max(num_tokens - num_seqs, 0)
        decoded_TKGH = jnp.pad(out_SKGH, ((0, spare), (0, 0), (0, 0), (0, 0)))[:num_tokens]
        token_T111 = jax.lax.iota("int32", num_tokens)[:, None, None, None]
        # Zeros for padding, whose rows no kernel wrote.
        is_real_T111 = token_T111 < layout.query_starts_S1[layout.num_seqs]
        out_TKGH = jnp.where(is_real_T111, out_TKGH, 0)
        out_TKGH = jnp.where(token_T111 < layout.num_decodes, decoded_TKGH, out_TKGH)
    if params.v_scale_K is not None:
        scale_K11 = value_scale_K(params, num_heads)[:, None, None]
        out_TKGH = (out_TKGH.astype(jnp.float32) * scale_K11).astype(out_TKGH.dtype)
    return out_TKGH


class _Inputs(NamedTuple):
    """What a dialect's kernels need besides queries and pages."""

    layout: StepLayout
    splits: DecodeSplits
    blocks: PrefillBlocks | None  # None: the step has decodes only
    scale2_K: Array  # of the logits, base 2
    sinks_KG: Array | None


def _attend_triton(
    q_TKGH: Array,
    pages_PKBC: Array,
    inputs: _Inputs,
    *,
    how: GpuAttention,
    spec: AttentionSpec,
) -> tuple[Array, Array | None]:
    layout, splits, blocks, scale2_K, sinks_KG = inputs
    weighing = gpu_triton.Weighing(scale2_K, sinks_KG, spec)
    interpret = how.interpret is not None
    if pages_PKBC.dtype == jnp.float8_e4m3fn and not how.device.has_fp8:
        pages_PKBC = jax.lax.bitcast_convert_type(pages_PKBC, jnp.uint8)
    out_SKGH = gpu_triton.attend_decodes(
        _decoding(q_TKGH, layout), pages_PKBC, layout, splits, weighing, interpret=interpret
    )
    if blocks is None:
        return out_SKGH, None
    out_TKGH = gpu_triton.attend_blocks(
        q_TKGH, pages_PKBC, layout, blocks, weighing, interpret=interpret
    )
    return out_SKGH, out_TKGH


def _attend_mosaic(
    q_TKGH: Array,
    pages_PKBC: Array,
    inputs: _Inputs,
    *,
    how: GpuAttention,
    spec: AttentionSpec,
) -> tuple[Array, Array | None]:
    layout, splits, blocks, scale2_K, sinks_KG = inputs
    decode = make_kernel_spec("decode", q_TKGH, pages_PKBC, spec, interpret=how.interpret)
    q_SKGH = _decoding(q_TKGH, layout)
    partial_NKGH, log_sum_NKX = gpu_decode.attend_splits(
        q_SKGH, pages_PKBC, layout, splits, scale2_K, decode
    )
    out_SKGH = combine(
        partial_NKGH,
        log_sum_NKX,
        splits.starts_S1,
        sinks_KG,
        consumers=decode.consumers,
        dtype=q_TKGH.dtype,
        interpret=how.interpret,
    )
    if blocks is None:
        return out_SKGH, None
    prefill = make_kernel_spec("prefill", q_TKGH, pages_PKBC, spec, interpret=how.interpret)
    out_TKGH = gpu_prefill.attend_blocks(
        q_TKGH, pages_PKBC, layout.page_table_RM, blocks.info_I4, scale2_K, sinks_KG, prefill
    )
    return out_SKGH, out_TKGH


def _decoding(q_TKGH: Array, layout: StepLayout) -> Array:
    """The queries of the first S tokens, as many as there may be decodes."""
    num_tokens, num_seqs = q_TKGH.shape[0], layout.slots_S.shape[0]
    spare = max(num_seqs - num_tokens, 0)
    return jnp.pad(q_TKGH[:num_seqs], ((0, spare), (0, 0), (0, 0), (0, 0)))


def make_kernel_spec(
    phase: Literal["decode", "prefill"],
    q_TKGH: Array,
    pages_PKBC: Array,
    spec: AttentionSpec,
    *,
    interpret: Any = None,
) -> KernelSpec:
    """The statics of a Mosaic kernel: as many blocks of keys as shared memory holds."""
    group, head_dim = q_TKGH.shape[2:]
    itemsize = pages_PKBC.dtype.itemsize
    consumers = num_consumers(head_dim)
    key_block = KEY_BLOCKS[phase][head_dim]
    if phase == "decode":  # one tile of queries for all; results in float32
        fixed = ROWS * head_dim * (itemsize + 4 * consumers)
    else:
        fixed = ROWS * head_dim * 2 * itemsize * consumers
    slots = min((SMEM_BYTES - fixed) // (key_block * 2 * head_dim * itemsize), MAX_SLOTS)
    return KernelSpec(
        group=group,
        head_dim=head_dim,
        page_size=pages_PKBC.shape[2],
        key_block=key_block,
        num_slots=slots // consumers * consumers,
        consumers=consumers,
        window=spec.window,
        soft_cap=spec.soft_cap,
        interpret=interpret,
    )
