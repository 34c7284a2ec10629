"""What the scheduler tells the runner to do in one step, and what comes back.

Knows nothing of JAX, of queues or of the wire. Tokens, pages and slots are plain integers:
a *slot* is a row of the device-resident per-sequence state (page table, last tokens, sampler
state), a *page* is a row of the paged KV cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from jaxinfer.core.sampling_params import SamplingParams

PENDING_TOKEN = -1
"""Stands for a token that the step before samples: the device has it, the host does not yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """A sequence (re)enters a slot: all that the runner must know of it, once.

    `output_token_ids` is empty for a new request and holds what was generated so far when a
    preempted request resumes.
    """

    sampling: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


class ScheduledSeq(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence's share of a step. (A Struct: one is made per sequence and step, and a frozen
    dataclass takes nine times as long to make.)"""

    request_id: str
    slot: int  # 0 <= slot < max_num_seqs, held while the sequence runs
    start: int  # tokens whose KV is in the cache before this step
    token_ids: Sequence[int]  # tokens to compute; PENDING_TOKEN may stand only at the end
    samples: bool  # the step reaches the sequence's last token, so it yields a new one
    output_index: int  # position in the output of the token that would be sampled
    first_new_page: int  # index in the slot's page table of new_pages[0]
    new_pages: Sequence[int]  # pages appended to the slot's table by this step
    admission: Admission | None  # set in the first step after the slot was taken


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledStep:
    """One step. Sequences with exactly one token come first, so decodes form a prefix."""

    step_id: int
    seqs: Sequence[ScheduledSeq]
    num_tokens: int  # sum of len(seq.token_ids)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, of the model's raw distribution (natural log).

    Entry 0 is the token that is there (sampled, or the prompt's own); the k most likely tokens
    follow, most likely first (the token itself may be among them again).
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of entry 0, 1 = most likely


class SeqOutput(msgspec.Struct, frozen=True):
    """What a step gave for one sequence; fields are empty where the step gave nothing.

    (A Struct for the same reason as ScheduledSeq.)
    """

    token_ids: Sequence[int]  # newly sampled tokens (one; more with speculation; none mid-prefill)
    logprobs: Sequence[TokenLogprobs]  # as many as token_ids, when the request asked for them
    prompt_logprobs: Sequence[TokenLogprobs]  # of prompt tokens start+1 .. start+len(token_ids)
    error: str | None = None  # the sequence's numbers broke (NaN logits); it must fail alone


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """Results of one step, `seqs` in the order of `ScheduledStep.seqs`."""

    step_id: int
    seqs: Sequence[SeqOutput]
