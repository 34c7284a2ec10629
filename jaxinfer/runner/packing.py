"""A step as one row of int32 words: packed on the host, read back inside the jit.

One transfer a step carries everything the device does not have already. `_sections` is the only
description of the layout; both directions use it.

Letters: T tokens, S sequences, U page updates, W sampling words.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from jaxinfer.core.step import ScheduledSeq
from jaxinfer.runner.buckets import Bucket
from jaxinfer.sampling.params import NUM_WORDS, step_words


class StepInputs(NamedTuple):
    """What a step is told, in the jit; all int32."""

    token_ids_T: Array  # PENDING_TOKEN: the slot's last sampled token
    query_starts_S1: Array
    slots_S: Array
    starts_S: Array
    wants_prompt_S: Array  # 1: log-probabilities of the prompt's tokens are wanted
    next_token_S: Array  # the prompt token behind the chunk, -1 at the prompt's end
    sampling_SW: Array
    page_slots_U: Array  # slots outside the table: no update
    page_columns_U: Array
    page_ids_U: Array
    num_seqs: Array
    num_decodes: Array


class PromptChunk(NamedTuple):
    """The part of a step in which a sequence wants log-probabilities of its prompt."""

    num_logprobs: int  # likeliest tokens wanted besides the prompt's own
    num_targets: int  # prompt tokens behind the chunk's first ones: those that are scored
    next_token: int  # the prompt token behind the chunk, -1 at the prompt's end


def num_page_updates(bucket: Bucket, page_size: int) -> int:
    """U: room for one new page a sequence and the pages of the step's tokens."""
    return bucket.num_seqs + bucket.num_tokens // page_size


@cache
def _sections(bucket: Bucket, page_size: int) -> Mapping[str, int]:
    """Words of each field of StepInputs, in their order."""
    num_updates = num_page_updates(bucket, page_size)
    return {
        "token_ids_T": bucket.num_tokens,
        "query_starts_S1": bucket.num_seqs + 1,
        "slots_S": bucket.num_seqs,
        "starts_S": bucket.num_seqs,
        "wants_prompt_S": bucket.num_seqs,
        "next_token_S": bucket.num_seqs,
        "sampling_SW": bucket.num_seqs * NUM_WORDS,
        "page_slots_U": num_updates,
        "page_columns_U": num_updates,
        "page_ids_U": num_updates,
        "num_seqs": 1,
        "num_decodes": 1,
    }


def num_words(bucket: Bucket, page_size: int) -> int:
    """Length of a bucket's row."""
    return sum(_sections(bucket, page_size).values())


def _split(words: Any, bucket: Bucket, page_size: int) -> dict[str, Any]:
    """Views of the sections of a row, a numpy or a JAX array."""
    views, start = {}, 0
    for name, length in _sections(bucket, page_size).items():
        views[name] = words[start : start + length]
        start += length
    return views


def unpack_step(words: Array, bucket: Bucket, page_size: int) -> StepInputs:
    """The row's fields, inside the jit."""
    fields = _split(words, bucket, page_size)
    fields["sampling_SW"] = fields["sampling_SW"].reshape(bucket.num_seqs, NUM_WORDS)
    fields["num_seqs"] = fields["num_seqs"][0]
    fields["num_decodes"] = fields["num_decodes"][0]
    return StepInputs(**fields)


def pack_step(
    seqs: Sequence[ScheduledSeq],
    bucket: Bucket,
    *,
    page_size: int,
    sampling_table_RW: np.ndarray,
    prompts: Mapping[int, PromptChunk],
) -> np.ndarray:
    """The row of a step on the host; `prompts` to score, by index in `seqs`.

    The new pages of all sequences must fit `num_page_updates`.
    """
    words = np.zeros(num_words(bucket, page_size), np.int32)
    view = _split(words, bucket, page_size)
    num_seqs = len(seqs)
    # Lists first: writing single numbers into an array takes ten times as long.
    token_ids: list[int] = []
    query_starts: list[int] = []
    for seq in seqs:
        query_starts.append(len(token_ids))
        token_ids += seq.token_ids
    view["token_ids_T"][: len(token_ids)] = token_ids
    view["query_starts_S1"][:num_seqs] = query_starts
    view["query_starts_S1"][num_seqs:] = len(token_ids)
    view["slots_S"][:num_seqs] = [seq.slot for seq in seqs]
    view["starts_S"][:num_seqs] = [seq.start for seq in seqs]
    view["next_token_S"][:num_seqs] = -1
    for index, chunk in prompts.items():
        view["wants_prompt_S"][index] = 1
        view["next_token_S"][index] = chunk.next_token
    _pack_pages(view, seqs, no_slot=sampling_table_RW.shape[0])
    is_padded = [0] * (bucket.num_seqs - num_seqs)
    view["sampling_SW"].reshape(bucket.num_seqs, NUM_WORDS)[:] = step_words(
        sampling_table_RW,
        slots_S=view["slots_S"],
        output_indices_S=np.array([seq.output_index for seq in seqs] + is_padded, np.int32),
        samples_S=np.array([seq.samples for seq in seqs] + is_padded, np.bool_),
    )
    view["num_seqs"][0] = num_seqs
    view["num_decodes"][0] = (
        num_seqs if len(token_ids) == num_seqs else sum(len(seq.token_ids) == 1 for seq in seqs)
    )
    return words


def _pack_pages(
    view: Mapping[str, np.ndarray], seqs: Sequence[ScheduledSeq], *, no_slot: int
) -> None:
    """Writes the updates of the page table; those that are not needed go to `no_slot`."""
    slots: list[int] = []
    columns: list[int] = []
    page_ids: list[int] = []
    for seq in seqs:
        if seq.new_pages:
            num_pages = len(seq.new_pages)
            slots += [seq.slot] * num_pages
            columns += range(seq.first_new_page, seq.first_new_page + num_pages)
            page_ids += seq.new_pages
    view["page_slots_U"][: len(slots)] = slots
    view["page_slots_U"][len(slots) :] = no_slot
    view["page_columns_U"][: len(columns)] = columns
    view["page_ids_U"][: len(page_ids)] = page_ids
