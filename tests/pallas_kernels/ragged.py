"""Random ragged steps for the paged attention op, and its answer by dense softmax in numpy.

What a backend must not read is poison: NaN in pages of nobody, in places that no token has reached
and in the queries of padding, infinity in its keys and values (so that a write of them is seen).
int8 has no NaN: its poison is -128, which no token is stored as.
"""

from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from pallas_kernels.paged_attention.api import (
    NO_PARAMS,
    AttentionParams,
    AttentionSpec,
    StepLayout,
)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The static sizes of a step; the letters are those of api.py."""

    T: int
    S: int
    K: int
    G: int
    H: int
    B: int
    M: int
    P: int
    dtype: str
    page_dtype: str | None = None  # None: that of the operands

    @property
    def np_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)

    @property
    def page_np_dtype(self) -> np.dtype:
        return np.dtype(self.page_dtype or self.dtype)

    @property
    def num_slots(self) -> int:
        return self.S + 3


class Sequence(NamedTuple):
    """Tokens of a sequence that are in the cache, and those that the step adds."""

    num_cached: int
    num_new: int

    @property
    def length(self) -> int:
        return self.num_cached + self.num_new


class Step(NamedTuple):
    """Inputs of the op, and what must come of them."""

    layout: StepLayout  # numpy
    q_TKGH: np.ndarray
    k_TKH: np.ndarray
    v_TKH: np.ndarray
    pages_PKBC: np.ndarray
    expected_TKGH: np.ndarray  # float64; rows of padding are NaN
    new_pages_PKBC: np.ndarray


@st.composite
def sequences(draw: st.DrawFn, shapes: Shapes, *, decode_only: bool) -> list[Sequence]:
    """Decodes first, then chunks, as many as fit; lengths lie often at the edge of a page."""
    page, longest = shapes.B, shapes.M * shapes.B
    edges = sorted({n for m in (1, 2, shapes.M) for n in (m * page - 1, m * page, m * page + 1)})
    lengths = st.one_of(st.sampled_from(edges), st.integers(0, longest))
    found: list[Sequence] = []
    tokens_left, pages_left = shapes.T, shapes.P
    for _ in range(draw(st.integers(0, shapes.S))):
        num_new = 1 if decode_only or draw(st.booleans()) else draw(lengths)
        num_new = max(1, min(num_new, tokens_left, longest))
        num_cached = min(draw(lengths), longest - num_new, pages_left * page - num_new)
        if tokens_left < num_new or num_cached < 0:
            break
        found.append(Sequence(num_cached, num_new))
        tokens_left -= num_new
        pages_left -= -(-found[-1].length // page)
    return sorted(found, key=lambda sequence: sequence.num_new > 1)


def random_params(shapes: Shapes, *, sinks: bool, scales: bool, seed: int = 0) -> AttentionParams:
    """Sinks about as large as logits are, scales that fill the range of one byte.

    Scales are powers of two, so that a quotient at the edge between two stored values is the same
    whether a compiler divides or multiplies by the inverse. Neighbouring heads have others.
    """
    rng = np.random.default_rng(seed)
    largest = -4 if shapes.page_np_dtype == np.int8 else -6
    exponent_K = largest - np.arange(shapes.K) % 2
    scale_K = np.exp2(exponent_K).astype(np.float32)
    return AttentionParams(
        sinks_KG=rng.normal(size=(shapes.K, shapes.G)).astype(np.float32) if sinks else None,
        k_scale_K=scale_K if scales else None,
        v_scale_K=scale_K / 2 if scales else None,
    )


def make_step(
    sequences: list[Sequence],
    shapes: Shapes,
    spec: AttentionSpec,
    *,
    seed: int,
    params: AttentionParams = NO_PARAMS,
    poison_before_window: bool = False,
) -> Step:
    """A step of these sequences with random contents.

    With `poison_before_window`, pages that end before the window of a sequence's first query are
    poison as well: a backend that promises not to fetch them must not notice.
    """
    rng = np.random.default_rng(seed)
    dtype = shapes.np_dtype

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    q_TKGH = np.full((shapes.T, shapes.K, shapes.G, shapes.H), np.nan, dtype)
    k_TKH = np.full((shapes.T, shapes.K, shapes.H), np.inf, dtype)
    v_TKH = np.full_like(k_TKH, np.inf)
    page_dtype = shapes.page_np_dtype
    poison = np.array(-128 if page_dtype == np.int8 else np.nan).astype(page_dtype)
    pages_PKBC = np.full((shapes.P, shapes.K, shapes.B, 2 * shapes.H), poison, page_dtype)
    expected_TKGH = np.full(q_TKGH.shape, np.nan)
    # Columns behind a sequence's pages hold what was there before: pages of others, or of nobody.
    table_RM = rng.integers(0, shapes.P, (shapes.num_slots, shapes.M), dtype=np.int32)
    slots = rng.permutation(shapes.num_slots)[: shapes.S].astype(np.int32)
    free_pages = list(rng.permutation(shapes.P))
    new_pages_PKBC = pages_PKBC.copy()
    start = 0
    for slot, sequence in zip(slots, sequences, strict=False):
        rows = slice(start, start + sequence.num_new)
        start += sequence.num_new
        kv_XKC = normal(sequence.length, shapes.K, 2 * shapes.H)
        q_TKGH[rows] = normal(sequence.num_new, shapes.K, shapes.G, shapes.H)
        k_TKH[rows] = kv_XKC[sequence.num_cached :, :, : shapes.H]
        v_TKH[rows] = kv_XKC[sequence.num_cached :, :, shapes.H :]
        stored_XKC = store(kv_XKC, params, page_dtype)
        first_seen = 0 if spec.window is None else max(0, sequence.num_cached - spec.window + 1)
        for position in range(sequence.length):
            column, place = divmod(position, shapes.B)
            if place == 0:
                table_RM[slot, column] = free_pages.pop()
            page = table_RM[slot, column]
            if poison_before_window and (column + 1) * shapes.B <= min(
                first_seen, sequence.num_cached
            ):
                continue
            new_pages_PKBC[page, :, place] = stored_XKC[position]
            if position < sequence.num_cached:
                pages_PKBC[page, :, place] = stored_XKC[position]
        expected_TKGH[rows] = dense_attention(
            q_TKGH[rows], restore(stored_XKC, params), spec, params
        )
    lengths = [sequence.num_new for sequence in sequences]
    padding = shapes.S - len(sequences)
    layout = StepLayout(
        slots_S=slots,
        starts_S=np.array([s.num_cached for s in sequences] + [0] * padding, np.int32),
        query_starts_S1=np.cumsum([0, *lengths, *[0] * padding], dtype=np.int32),
        num_seqs=np.int32(len(sequences)),
        num_decodes=np.int32(lengths.count(1)),
        page_table_RM=table_RM,
    )
    return Step(layout, q_TKGH, k_TKH, v_TKH, pages_PKBC, expected_TKGH, new_pages_PKBC)


def store(kv_XKC: np.ndarray, params: AttentionParams, dtype: np.dtype) -> np.ndarray:
    """Keys and values as pages hold them."""
    if dtype.itemsize > 1:
        return kv_XKC.astype(dtype)
    scaled_XKC = kv_XKC.astype(np.float32) / _scale_KC(params, kv_XKC)
    limit = np.float32(127 if dtype == np.int8 else ml_dtypes.finfo(dtype).max)
    scaled_XKC = scaled_XKC.clip(-limit, limit)
    return (np.rint(scaled_XKC) if dtype == np.int8 else scaled_XKC).astype(dtype)


def restore(stored_XKC: np.ndarray, params: AttentionParams) -> np.ndarray:
    """float64 keys and values of stored ones."""
    return stored_XKC.astype(np.float64) * _scale_KC(params, stored_XKC)


def _scale_KC(params: AttentionParams, kv_XKC: np.ndarray) -> np.ndarray:
    _, num_kv, width = kv_XKC.shape
    scale_KC = np.ones((num_kv, width), np.float32)
    if params.k_scale_K is not None:
        scale_KC[:, : width // 2] = np.asarray(params.k_scale_K)[:, None]
    if params.v_scale_K is not None:
        scale_KC[:, width // 2 :] = np.asarray(params.v_scale_K)[:, None]
    return scale_KC


def dense_attention(
    q_TKGH: np.ndarray,
    kv_XKC: np.ndarray,
    spec: AttentionSpec,
    params: AttentionParams = NO_PARAMS,
) -> np.ndarray:
    """The last T tokens of one sequence of X attend to it; float64 [T, K, G, H]."""
    num_tokens, head_dim = q_TKGH.shape[0], q_TKGH.shape[-1]
    key_XKH, value_XKH = np.split(kv_XKC.astype(np.float64), [head_dim], axis=-1)
    logits_TKGX = spec.scale * np.einsum("TKGH,XKH->TKGX", q_TKGH.astype(np.float64), key_XKH)
    if spec.soft_cap is not None:
        logits_TKGX = spec.soft_cap * np.tanh(logits_TKGX / spec.soft_cap)
    key = np.arange(len(kv_XKC))
    query = key[len(kv_XKC) - num_tokens :, None]
    visible_TX = key <= query
    if spec.window is not None:
        visible_TX &= key > query - spec.window
    logits_TKGX = np.where(visible_TX[:, None, None], logits_TKGX, -np.inf)
    if params.sinks_KG is not None:  # one more key, whose value is zero
        sinks_TKG1 = np.broadcast_to(params.sinks_KG[..., None], (*logits_TKGX.shape[:3], 1))
        logits_TKGX = np.concatenate([logits_TKGX, sinks_TKG1], axis=-1)
        value_XKH = np.concatenate([value_XKH, np.zeros_like(value_XKH[:1])])
    weights_TKGX = np.exp(logits_TKGX - logits_TKGX.max(axis=-1, keepdims=True))
    weights_TKGX /= weights_TKGX.sum(axis=-1, keepdims=True)
    return np.einsum("TKGX,XKH->TKGH", weights_TKGX, value_XKH)
