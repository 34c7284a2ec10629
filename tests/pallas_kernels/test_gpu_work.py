"""Lists of work for GPUs: every key of a decode and every query of a chunk is done exactly once."""

from typing import NamedTuple

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention.api import StepLayout
from pallas_kernels.paged_attention.gpu_work import (
    MIN_UNITS,
    UNIT,
    WAVES,
    block_prefills,
    split_decodes,
)

S, T, AT_ONCE = 6, 90, 5


class Lengths(NamedTuple):
    """Of each sequence: tokens in the cache, tokens of the step."""

    cached: tuple[int, ...]
    new: tuple[int, ...]


@st.composite
def steps(draw: st.DrawFn) -> Lengths:
    new = sorted(draw(st.lists(st.sampled_from((1, 1, 2, 7, 8, 9, 30)), max_size=S)))
    while sum(new) > T:
        new.pop()
    lengths = st.one_of(st.integers(0, 5000), st.sampled_from((0, UNIT - 1, UNIT, 100_000)))
    return Lengths(tuple(draw(lengths) for _ in new), tuple(new))


def layout_of(lengths: Lengths) -> StepLayout:
    padding = S - len(lengths.new)
    return StepLayout(
        slots_S=np.arange(S, dtype=np.int32) + 3,
        starts_S=np.array([*lengths.cached, *[0] * padding], np.int32),
        query_starts_S1=np.cumsum([0, *lengths.new, *[0] * padding], dtype=np.int32),
        num_seqs=np.int32(len(lengths.new)),
        num_decodes=np.int32(lengths.new.count(1)),
        page_table_RM=np.zeros((S + 3, 1), np.int32),
    )


SPLIT = jax.jit(lambda layout: split_decodes(layout, blocks_at_once=AT_ONCE))
BLOCK = jax.jit(lambda layout: block_prefills(layout, num_tokens=T, tokens_per_block=8))


@settings(max_examples=60, deadline=None)
@given(steps())
def test_splits_cover_the_keys_of_decodes(lengths: Lengths):
    splits = jax.tree.map(np.asarray, SPLIT(layout_of(lengths)))
    decodes = lengths.cached[: lengths.new.count(1)]
    total = splits.starts_S1[-1]
    assert total == splits.starts_S1[len(decodes)]
    assert (splits.info_N4[total:] == 0).all()
    for seq, position in enumerate(decodes):
        mine = slice(splits.starts_S1[seq], splits.starts_S1[seq + 1])
        assert (splits.seq_N[mine] == seq).all()
        slots, positions, firsts, ends = splits.info_N4[mine].T
        assert (slots == seq + 3).all() and (positions == position).all()
        assert firsts[0] == 0 and ends[-1] == position + 1
        assert (firsts[1:] == ends[:-1]).all() and (firsts % UNIT == 0).all()
        assert (ends > firsts).all()


@settings(max_examples=60, deadline=None)
@given(steps())
def test_splits_are_even_and_no_more_than_are_useful(lengths: Lengths):
    """The longest is about what a block would have to do if all keys were dealt out evenly."""
    splits = jax.tree.map(np.asarray, SPLIT(layout_of(lengths)))
    decodes = np.array(lengths.cached[: lengths.new.count(1)], np.int64)
    units = (decodes // UNIT + 1).sum()
    share = -(-units // (AT_ONCE if len(decodes) <= AT_ONCE else WAVES * AT_ONCE))
    _, _, first_N, end_N = splits.info_N4.T
    assert (end_N - first_N).max(initial=0) <= UNIT * max(share, MIN_UNITS)
    assert splits.starts_S1[-1] <= len(splits.seq_N)


@settings(max_examples=60, deadline=None)
@given(steps())
def test_blocks_cover_the_queries_of_chunks(lengths: Lengths):
    (info_I4,) = jax.tree.map(np.asarray, BLOCK(layout_of(lengths)))
    starts = np.cumsum([0, *lengths.new])
    seen: dict[int, tuple[int, int]] = {}  # token -> page table row, position
    for slot, position, token, count in info_I4:
        assert count <= 8
        for offset in range(count):
            assert token + offset not in seen
            seen[token + offset] = (slot, position + offset)
    expected = {
        starts[seq] + offset: (seq + 3, lengths.cached[seq] + offset)
        for seq, count in enumerate(lengths.new)
        for offset in range(count)
        if count > 1
    }
    assert seen == expected


def test_the_blocks_that_read_most_come_first():
    (info_I4,) = jax.tree.map(np.asarray, BLOCK(layout_of(Lengths((10,), (30,)))))
    assert list(info_I4[:5, 1]) == [34, 26, 18, 10, 0]
