"""Ragged paged attention: the types of the op, shared by every backend.

One op writes the step's new keys and values into their pages and attends over all pages of each
sequence, for decodes, prefill chunks and any mix of them in one call.

Letters: T tokens of the step, S sequences, K kv heads, G query heads per kv head, H head dim,
P pages, B tokens per page, C = 2H (a token's key, then its value), R rows of the page table,
M pages per row.

Cache layout `pages_PKBC` [num_pages, K, page_size, 2*H]. Why: a page is one contiguous block
with all heads of a device, so one DMA brings it; its last two dims are whole (16, 128) tiles of a
TPU for every head size from 64 and every number of heads, including one; a (page, head) is a
plain [page_size, 2*H] matrix, which is what TMA boxes on NVIDIA GPUs and a CPU's caches like; and
splitting over the tensor axis is splitting dim 1.

Pages of one byte (int8, float8_e4m3fn) hold values divided by a scale of the layer and kv head:
`AttentionParams`, quantized.py.

This package imports jax only.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What is fixed when a layer is built."""

    scale: float  # softmax(scale * q.k)
    window: int | None = None  # a token sees itself and the window-1 tokens before it
    soft_cap: float | None = None  # logits become cap * tanh(logits / cap)


class AttentionParams(NamedTuple):
    """What a layer's weights give the op besides projections; None: the layer has none of it.

    The attention sink of a query head is a logit that takes part in the softmax's sum and has no
    value (Xiao et al. 2023, arXiv 2309.17453, as learned per head by gpt-oss); it is neither
    scaled nor capped. Scales are for pages of one byte: what is stored times the scale is the
    key or value; None is a scale of one.
    """

    sinks_KG: Array | None = None  # float32
    k_scale_K: Array | None = None  # float32
    v_scale_K: Array | None = None  # float32

    @property
    def is_empty(self) -> bool:
        """Whether the layer has none of it."""
        return all(param is None for param in self)


NO_PARAMS = AttentionParams()


class StepLayout(NamedTuple):
    """Where a step's tokens are; device arrays, the same for all layers.

    Sequences with exactly one token come first: token i of the first `num_decodes` is sequence i.
    """

    slots_S: Array  # int32 [S] row of each sequence in page_table_RM (any row for padding)
    starts_S: Array  # int32 [S] tokens of the sequence that are in the cache before this step
    query_starts_S1: Array  # int32 [S+1] first token of each sequence; padding repeats the end
    num_seqs: Array  # int32 []
    num_decodes: Array  # int32 []
    page_table_RM: Array  # int32 [R, M]


class TokenPlaces(NamedTuple):
    """Where each of T tokens belongs; all int32 [T]. Padding: position 0, a page that is none."""

    seq_T: Array  # index of its sequence in the step
    position_T: Array  # in its sequence
    page_T: Array  # page that receives its key and value; num_pages (dropped) for padding
    offset_T: Array  # place in that page


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["layout", "places", "work"],
    meta_fields=["decode_only"],
)
@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """The per-step metadata, computed once by `plan` and read by every layer."""

    layout: StepLayout
    places: TokenPlaces
    work: tuple[Array, ...]  # a backend's own list of work
    decode_only: bool  # static: every sequence has one token, T == S


class PagedAttention(Protocol):
    """The op. Returns the attention output [T, K, G, H] and the updated pages."""

    def __call__(
        self,
        q_TKGH: Array,
        k_TKH: Array,
        v_TKH: Array,
        pages_PKBC: Array,
        batch: AttentionBatch,
        spec: AttentionSpec,
        params: AttentionParams = NO_PARAMS,
    ) -> tuple[Array, Array]: ...


class EmptyPages(Protocol):
    """Makes a layer's pages; what is in them is not said, since the op reads what it has written.

    `shape` [P, K, B, 2H]; `dtype` is that of the storage.
    """

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array: ...


class PlanAttention(Protocol):
    """Makes the per-step metadata. `decode_only`: every sequence has one token and T == S."""

    def __call__(
        self,
        layout: StepLayout,
        places: TokenPlaces,
        *,
        decode_only: bool,
    ) -> AttentionBatch: ...


def locate_tokens(
    layout: StepLayout, *, num_tokens: int, num_pages: int, page_size: int
) -> TokenPlaces:
    """The places of a step's tokens, from its layout."""
    tokens_T = jax.lax.iota("int32", num_tokens)
    last_seq = layout.slots_S.shape[0] - 1
    # The sequence of a token is the number of sequences that end at or before it.
    ends_S = layout.query_starts_S1[1:]
    seq_T = (tokens_T[:, None] >= ends_S[None, :]).sum(axis=1, dtype="int32").clip(max=last_seq)
    is_real_T = tokens_T < layout.query_starts_S1[layout.num_seqs]
    position_T = layout.starts_S[seq_T] + tokens_T - layout.query_starts_S1[seq_T]
    position_T = jnp.where(is_real_T, position_T, 0)
    page_T = layout.page_table_RM[layout.slots_S[seq_T], position_T // page_size]
    return TokenPlaces(
        seq_T=seq_T,
        position_T=position_T,
        page_T=jnp.where(is_real_T, page_T, num_pages),
        offset_T=position_T % page_size,
    )
