"""A packed step, read back inside a jit, says what the schedule said."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import PENDING_TOKEN, ScheduledStep
from jaxinfer.runner.buckets import Bucket
from jaxinfer.runner.packing import (
    PromptChunk,
    StepInputs,
    num_page_updates,
    num_words,
    pack_step,
    unpack_step,
)
from jaxinfer.sampling.params import NUM_WORDS, pack_sampling, step_words, unpack_sampling
from tests.runner.steps import make_seq, make_step, steps

PAGE_SIZE = 8
NUM_SLOTS = 5
BUCKET = Bucket(num_tokens=32, num_seqs=NUM_SLOTS, decode_only=False)
TABLE_RW = np.stack(
    [
        pack_sampling(
            SamplingParams(
                temperature=0.1 + slot,
                top_p=0.5,
                top_k=slot + 1,
                seed=(slot << 40) + 7,
                logprobs=1 if slot == 2 else None,
            ),
            default_seed=0,
        )
        for slot in range(NUM_SLOTS - 3)
    ]
    + [pack_sampling(SamplingParams(temperature=0.0), default_seed=slot) for slot in range(3)]
)

read = jax.jit(partial(unpack_step, bucket=BUCKET, page_size=PAGE_SIZE))


def pack(
    step: ScheduledStep, prompts: dict[int, PromptChunk] | None = None, bucket: Bucket = BUCKET
) -> np.ndarray:
    return pack_step(
        step.seqs,
        bucket,
        page_size=PAGE_SIZE,
        sampling_table_RW=TABLE_RW,
        prompts=prompts or {},
    )


def round_trip(step: ScheduledStep, prompts: dict[int, PromptChunk] | None = None) -> StepInputs:
    words = pack(step, prompts)
    assert words.dtype == np.int32
    assert words.shape == (num_words(BUCKET, PAGE_SIZE),)
    return jax.tree.map(np.asarray, read(jnp.asarray(words)))


@settings(deadline=None, max_examples=60)
@given(step=steps(max_num_seqs=NUM_SLOTS, max_num_tokens=32), data=st.data())
def test_round_trip(step: ScheduledStep, data: st.DataObject):
    prompts = [data.draw(st.none() | st.integers(-1, 1000)) for _ in step.seqs]
    chunks = {
        index: PromptChunk(num_logprobs=1, num_targets=1, next_token=token)
        for index, token in enumerate(prompts)
        if token is not None
    }
    got = round_trip(step, chunks)
    num_seqs, S = len(step.seqs), BUCKET.num_seqs  # noqa: N806
    lengths = [len(seq.token_ids) for seq in step.seqs]
    tokens = [token for seq in step.seqs for token in seq.token_ids]
    assert got.num_seqs == num_seqs
    assert got.num_decodes == lengths.count(1)
    assert got.token_ids_T[: len(tokens)].tolist() == tokens
    assert not got.token_ids_T[len(tokens) :].any()
    starts = np.cumsum([0, *lengths]).tolist()
    assert got.query_starts_S1.tolist() == starts + [starts[-1]] * (S - num_seqs)
    assert got.slots_S[:num_seqs].tolist() == [seq.slot for seq in step.seqs]
    assert got.starts_S[:num_seqs].tolist() == [seq.start for seq in step.seqs]
    assert got.wants_prompt_S.tolist() == [int(index in chunks) for index in range(S)]
    wanted = [-1 if token is None else token for token in prompts]
    assert got.next_token_S[:num_seqs].tolist() == wanted
    check_page_updates(step, got)
    check_sampling(step, got)


def check_page_updates(step: ScheduledStep, got: StepInputs) -> None:
    """The updates, applied to a page table, put each new page in its row and column."""
    table = np.full((NUM_SLOTS, 64), -1)
    updated = np.asarray(
        jnp.asarray(table).at[got.page_slots_U, got.page_columns_U].set(got.page_ids_U, mode="drop")
    )
    for seq in step.seqs:
        for column, page in enumerate(seq.new_pages, start=seq.first_new_page):
            table[seq.slot, column] = page
    np.testing.assert_array_equal(updated, table)


def check_sampling(step: ScheduledStep, got: StepInputs) -> None:
    """Rows of those who sample are their slot's; all others are idle."""
    idle = 0
    for row in range(BUCKET.num_seqs):
        seq = step.seqs[row] if row < len(step.seqs) else make_seq(0, [0], samples=False)
        wanted_1W = step_words(
            TABLE_RW,
            slots_S=np.array([seq.slot]),
            output_indices_S=np.array([seq.output_index]),
            samples_S=np.array([seq.samples]),
        )
        np.testing.assert_array_equal(got.sampling_SW[row : row + 1], wanted_1W)
        idle += not seq.samples
    slots_S = np.asarray(unpack_sampling(jnp.asarray(got.sampling_SW)).slot)
    sampling = [seq.slot for seq in step.seqs if seq.samples]
    assert sorted(slots_S.tolist()) == sorted(sampling + [NUM_SLOTS] * idle)


def test_many_new_pages_of_several_sequences():
    step = make_step(
        [
            make_seq(4, [PENDING_TOKEN], start=16, first_new_page=2, new_pages=[7]),
            make_seq(0, list(range(20)), first_new_page=0, new_pages=[3, 5, 9]),
            make_seq(2, list(range(8)), first_new_page=0, new_pages=[1]),
        ]
    )
    got = round_trip(step)
    updates = list(zip(got.page_slots_U, got.page_columns_U, got.page_ids_U, strict=True))
    assert updates[:5] == [(4, 2, 7), (0, 0, 3), (0, 1, 5), (0, 2, 9), (2, 0, 1)]
    assert all(slot == NUM_SLOTS for slot, _, _ in updates[5:])


def test_room_for_page_updates():
    """Every sequence may grow by a page, and the step's own tokens may fill new ones."""
    assert num_page_updates(BUCKET, PAGE_SIZE) == NUM_SLOTS + 32 // PAGE_SIZE
    decode = Bucket(num_tokens=4, num_seqs=4, decode_only=True)
    assert num_page_updates(decode, PAGE_SIZE) == 4
    full = [make_seq(slot, [1], new_pages=[slot], first_new_page=3) for slot in range(4)]
    words = pack(make_step(full), bucket=decode)
    assert words.size == num_words(decode, PAGE_SIZE)


def test_more_pages_than_there_is_room_for_are_refused():
    step = make_step(
        [make_seq(0, [1] * 8, new_pages=range(num_page_updates(BUCKET, PAGE_SIZE) + 1))]
    )
    with pytest.raises(ValueError, match="could not broadcast"):
        pack(step)


def test_the_row_has_a_place_for_every_field():
    """`_sections` and StepInputs name the same fields: nothing is packed and not read."""
    got = round_trip(make_step([make_seq(1, [5, 6])]))
    sizes = [np.size(leaf) for leaf in got]
    assert sum(sizes) == num_words(BUCKET, PAGE_SIZE)
    assert got.sampling_SW.shape == (BUCKET.num_seqs, NUM_WORDS)
