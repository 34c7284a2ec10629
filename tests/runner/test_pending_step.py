"""PendingStep: which row of the device's answer belongs to which sequence."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.core.step import PENDING_TOKEN, ScheduledSeq
from jaxinfer.runner.packing import PromptChunk
from jaxinfer.runner.runner import BROKEN_LOGITS, PendingStep
from jaxinfer.runner.step_fn import NO_TOKEN, StepResult
from tests.runner.steps import make_seq, make_step


def numbered(count: int, *, num_top: int = 4, broken: int | None = None) -> np.ndarray:
    """Logprobs that tell their position n: -n for the token, then -n - k/10; `broken` has a NaN.

    Packed as the device packs them, int32 [count, 2 + 2 num_top].
    """
    position_N1 = np.arange(count)[:, None]
    k_K = np.arange(1, num_top + 1)
    logprobs_NK = np.concatenate([-position_N1, -position_N1 - k_K / 10], axis=1, dtype=np.float32)
    if broken is not None:
        logprobs_NK[broken, 0] = np.nan
    ids_NK = (100 * position_N1 + k_K).astype(np.int32)
    rank_N1 = (position_N1 + 1).astype(np.int32)
    return np.concatenate([logprobs_NK.view(np.int32), rank_N1, ids_NK], axis=1)


def answer(
    seqs: list[ScheduledSeq],
    tokens: list[int],
    *,
    num_logprobs: dict[int, int] | None = None,
    prompts: dict[int, PromptChunk] | None = None,
    broken: int | None = None,
) -> PendingStep:
    result = StepResult(
        tokens_S=jnp.asarray(tokens, jnp.int32),
        logprobs_SW=jnp.asarray(numbered(len(tokens), broken=broken)),
        prompt_logprobs_TW=jnp.asarray(numbered(32, broken=broken)),
    )
    return PendingStep(make_step(seqs), result, num_logprobs or {}, prompts or {})


def test_only_those_who_sample_get_a_token():
    seqs = [
        make_seq(3, [PENDING_TOKEN]),
        make_seq(1, [4, 5, 6], samples=False),
        make_seq(0, [7, 8]),
    ]
    output = answer(seqs, [11, 12, 13, 0]).result()
    assert output.step_id == 0
    assert [seq.token_ids for seq in output.seqs] == [[11], [], [13]]
    assert all(not seq.logprobs and not seq.prompt_logprobs for seq in output.seqs)
    assert all(seq.error is None for seq in output.seqs)


def test_logprobs_of_the_row_and_as_many_as_wanted():
    seqs = [make_seq(slot, [PENDING_TOKEN]) for slot in range(3)]
    output = answer(seqs, [11, 12, 13, 0], num_logprobs={1: 2, 2: 0}).result()
    assert output.seqs[0].logprobs == []
    (second,) = output.seqs[1].logprobs
    assert second.token_ids == [12, 101, 102]
    assert second.logprobs == pytest.approx([-1.0, -1.1, -1.2])
    assert second.rank == 2
    (third,) = output.seqs[2].logprobs
    assert (third.token_ids, third.logprobs, third.rank) == ([13], [-2.0], 3)


def test_prompt_logprobs_are_those_of_the_tokens_behind():
    """Token t's row scores token t + 1: of the chunk, or the one behind the chunk."""
    seqs = [
        make_seq(2, [PENDING_TOKEN]),
        make_seq(0, [40, 41, 42], samples=False),
        make_seq(1, [50, 51]),
    ]
    goes_on = PromptChunk(num_logprobs=1, num_targets=3, next_token=43)
    ends = PromptChunk(num_logprobs=0, num_targets=1, next_token=-1)
    output = answer(seqs, [9, 9, 9], prompts={1: goes_on, 2: ends}).result()
    assert output.seqs[0].prompt_logprobs == []
    chunk = output.seqs[1].prompt_logprobs
    assert [entry.token_ids for entry in chunk] == [[41, 101], [42, 201], [43, 301]]
    assert [entry.logprobs[0] for entry in chunk] == [-1.0, -2.0, -3.0]
    assert [entry.rank for entry in chunk] == [2, 3, 4]
    (last,) = output.seqs[2].prompt_logprobs
    assert (last.token_ids, last.logprobs) == ([51], [-4.0])


def test_prompt_logprobs_in_a_chunk_that_ends_in_the_output():
    """A resumed request recomputes prompt and output in one chunk; only prompt tokens count."""
    seqs = [make_seq(0, [40, 41, 60, 61])]
    chunk = PromptChunk(num_logprobs=0, num_targets=1, next_token=-1)
    (seq,) = answer(seqs, [9], prompts={0: chunk}).result().seqs
    assert [entry.token_ids for entry in seq.prompt_logprobs] == [[41]]


def test_broken_logits_fail_their_sequence_alone():
    seqs = [make_seq(0, [PENDING_TOKEN]), make_seq(1, [PENDING_TOKEN])]
    output = answer(seqs, [NO_TOKEN, 5]).result()
    assert output.seqs[0].error == BROKEN_LOGITS
    assert output.seqs[1].error is None
    assert output.seqs[1].token_ids == [5]


def test_a_row_that_samples_nothing_has_no_error():
    """Rows of unfinished prompts have no token; what the device put there means nothing."""
    seqs = [make_seq(0, [1, 2], samples=False), make_seq(1, [3, 4])]
    output = answer(seqs, [NO_TOKEN, 5]).result()
    assert output.seqs[0].error is None


@pytest.mark.parametrize("where", ["logprobs", "prompt_logprobs"])
def test_broken_numbers_never_go_out_as_logprobs(where: str):
    """A NaN that no sampled token shows (masked, or in mid-prompt) still fails the sequence."""
    seqs = [make_seq(0, [1, 2], samples=where == "logprobs"), make_seq(1, [3, 4])]
    chunk = PromptChunk(num_logprobs=1, num_targets=1, next_token=-1)
    pending = answer(
        seqs,
        [8, 9],
        num_logprobs={1: 1, 0: 1} if where == "logprobs" else None,
        prompts={0: chunk, 1: chunk} if where == "prompt_logprobs" else None,
        broken=0,
    )
    first, second = pending.result().seqs
    assert first.error == BROKEN_LOGITS
    assert second.error is None
