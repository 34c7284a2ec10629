"""Runs every program once before the engine is ready, so that the first request finds them warm.

The first run of an executable costs more than the next ones: buffers and tables are mapped,
threads start, the call's fast path is made. Knows how a step is packed; leaves the state as it was.
"""

from collections.abc import Callable

import jax
import numpy as np

from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import ScheduledSeq
from jaxinfer.runner.buckets import Bucket
from jaxinfer.runner.packing import PromptChunk, pack_step
from jaxinfer.runner.runner import DeviceMemory, Programs
from jaxinfer.sampling.params import NUM_WORDS, pack_sampling
from jaxinfer.sampling.state import slot_row

_SLOT = 0
_TOKENS = (0, 0)  # that is a chunk of a prompt; every vocabulary has token 0
# Takes the sampler's long way, and computes log-probabilities.
_SAMPLING = SamplingParams(temperature=1.0, top_k=5, top_p=0.9, logprobs=1)


def warm_up(
    programs: Programs,
    weights: tuple[jax.Array, ...],
    memory: DeviceMemory,
    limits: EngineLimits,
    *,
    vocab_size: int,
    on_program: Callable[[str, int, int], None],
) -> DeviceMemory:
    """Runs each step program with one sequence and those that write slots; returns the memory.

    `memory` is used up. The state comes back as it was when no slot had been used. One page holds
    numbers that no sequence ever reads, like pages that sequences have left.
    `on_program(name, done, total)` is called before each program.
    """
    pages_L, state = memory
    on_every_device = state.page_table_RM.sharding  # as allocated; steps may give it another name
    total = len(programs.steps) + 1
    table_RW = np.zeros((limits.max_num_seqs, NUM_WORDS), np.int32)
    table_RW[_SLOT] = pack_sampling(_SAMPLING, default_seed=0)
    for index, (bucket, program) in enumerate(programs.steps.items()):
        on_program(str(bucket), index, total)
        words = _words(bucket, table_RW, limits)
        pages_L, state, result = program(weights, pages_L, state, words)
        for leaf in jax.tree.leaves(result):
            np.asarray(leaf)  # waits, and makes the way back to the host

    def put(array: np.ndarray | np.generic) -> jax.Array:
        return jax.device_put(array, on_every_device)

    on_program("write_slot and write_pages", total - 1, total)
    slot = put(np.int32(_SLOT))
    empty_row = slot_row(
        SamplingParams(),
        prompt_token_ids=(),
        output_token_ids=(),
        eos_token_ids=(),
        vocab_size=vocab_size,
    )
    state = programs.write_slot(state, slot, jax.tree.map(put, empty_row))
    no_pages_M = np.zeros(state.page_table_RM.shape[1], np.int32)
    state = programs.write_pages(state, slot, put(no_pages_M))
    jax.block_until_ready(state)
    on_program("done", total, total)
    return DeviceMemory(pages_L=pages_L, state=state)


def _words(bucket: Bucket, table_RW: np.ndarray, limits: EngineLimits) -> np.ndarray:
    """A step of one sequence in page 0."""
    token_ids = _TOKENS[:1] if bucket.decode_only else _TOKENS[: bucket.num_tokens]
    seq = ScheduledSeq(
        request_id="warm-up",
        slot=_SLOT,
        start=0,
        token_ids=token_ids,
        samples=True,
        output_index=0,
        first_new_page=0,
        new_pages=(0,),
        admission=None,
    )
    chunk = PromptChunk(num_logprobs=1, num_targets=len(token_ids), next_token=-1)
    return pack_step(
        [seq],
        bucket,
        page_size=limits.page_size,
        sampling_table_RW=table_RW,
        prompts={} if bucket.decode_only else {0: chunk},
    )
