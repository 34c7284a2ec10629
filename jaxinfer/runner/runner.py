"""Runs scheduled steps on the device: the only place where host and device state meet.

`dispatch` packs a step, puts it on the device and returns at once; the result is fetched when
somebody asks. Device memory (pages, slot state) is donated from step to step. Knows no requests:
what it must remember of a sequence, it keeps by slot.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.step import (
    Admission,
    ScheduledSeq,
    ScheduledStep,
    SeqOutput,
    StepOutput,
    TokenLogprobs,
)
from jaxinfer.parallel.rules import replicated
from jaxinfer.runner.buckets import Bucket, choose_bucket
from jaxinfer.runner.compiler import CompileCounter
from jaxinfer.runner.memory import MemoryPlan
from jaxinfer.runner.packing import PromptChunk, num_page_updates, pack_step
from jaxinfer.runner.step_fn import NO_TOKEN, DeviceState, StepResult
from jaxinfer.sampling.logprobs import Logprobs, unpack_logprobs
from jaxinfer.sampling.params import NUM_WORDS, pack_sampling
from jaxinfer.sampling.state import needs_slot_row, slot_row

BROKEN_LOGITS = (
    "the model gave no finite logits for this request (NaN or infinite numbers), or its "
    "allowed_token_ids, bad_words and logit_bias leave no token"
)
_NO_LOGPROBS: tuple[TokenLogprobs, ...] = ()
_NOTHING: Mapping[int, Any] = MappingProxyType({})  # wanted of no sequence of a step


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Everything the runner calls, compiled."""

    steps: Mapping[Bucket, Compiled]
    write_slot: Compiled  # (state, slot, SlotRow) -> state
    write_pages: Compiled  # (state, slot, page ids [M]) -> state


class DeviceMemory(NamedTuple):
    """What a step is given and gives back, changed."""

    pages_L: tuple[Array, ...]
    state: DeviceState


Allocate = Callable[[], DeviceMemory]


class DeviceArrays(NamedTuple):
    """What lives on the devices, and what makes the part anew that steps may spoil."""

    weights: tuple[Array, ...]
    memory: DeviceMemory
    allocate: Allocate


class Vocabulary(NamedTuple):
    """What the engine must know of the tokens."""

    size: int
    eos_token_ids: tuple[int, ...]


class _ScoredPrompt(NamedTuple):
    """A prompt whose tokens' log-probabilities are wanted."""

    token_ids: Sequence[int]
    num_logprobs: int


class Runner:
    """See engine/core.py for what the engine asks of it. Made by runner/build.py."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        limits: EngineLimits,
        memory: MemoryPlan,
        mesh: Mesh,
        programs: Programs,
        arrays: DeviceArrays,
        vocabulary: Vocabulary,
        counter: CompileCounter,
    ) -> None:
        self.config = config
        self.limits = limits
        self.memory = memory
        self.vocab_size = vocabulary.size
        self.eos_token_ids = vocabulary.eos_token_ids
        self.dtype = config.model.dtype
        self.device_name = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
        self._programs = programs
        self.buckets = tuple(programs.steps)
        self._weights, (self._pages_L, self._state), self._allocate = arrays
        self._counter = counter
        self._on_every_device = replicated(mesh)
        # A CPU device's arrays are read in place; "copying" them costs as much as packing a step.
        self._device_memory_is_apart = mesh.devices.flat[0].platform != "cpu"
        self._sampling_table_RW = np.zeros((limits.max_num_seqs, NUM_WORDS), np.int32)
        # By slot, and only of sequences that want them: most steps find both empty.
        self._num_logprobs: dict[int, int] = {}
        self._scored_prompts: dict[int, _ScoredPrompt] = {}

    @property
    def num_compiles_after_ready(self) -> int:
        return self._counter.num_after_ready

    def dispatch(self, step: ScheduledStep) -> "PendingStep":
        """Puts a step on the device; returns before it is done."""
        for seq in step.seqs:
            if seq.admission is not None:
                self._admit(seq.slot, seq.admission)
        prompts = self._prompt_chunks(step.seqs)
        bucket = choose_bucket(
            self.buckets,
            num_tokens=step.num_tokens,
            num_seqs=len(step.seqs),
            decode_only=step.num_tokens == len(step.seqs) and not prompts,
        )
        words = pack_step(
            self._write_long_tables(step.seqs, bucket),
            bucket,
            page_size=self.limits.page_size,
            sampling_table_RW=self._sampling_table_RW,
            prompts=prompts,
        )
        self._pages_L, self._state, result = self._programs.steps[bucket](
            self._weights,
            self._pages_L,
            self._state,
            words,  # as numpy: the call itself moves it, in half the time that device_put takes
        )
        pending = PendingStep(step, result, self._wanted_logprobs(step.seqs), prompts)
        if self._device_memory_is_apart:
            pending.start_transfers()
        return pending

    def reset(self) -> None:
        """Empties pages and slots, also when a step that failed took their arrays with it.

        Steps in flight are forgotten. Raises what JAX raises when the device is beyond that.
        """
        _free((self._pages_L, self._state))  # first: there is no room for both
        self._pages_L, self._state = self._allocate()
        jax.block_until_ready((self._pages_L, self._state))
        self._sampling_table_RW[:] = 0
        self._num_logprobs.clear()
        self._scored_prompts.clear()

    def close(self) -> None:
        """Frees the device memory."""
        _free((self._weights, self._pages_L, self._state))

    def _put(self, array: np.ndarray | np.generic) -> Array:
        return jax.device_put(array, self._on_every_device)

    def _admit(self, slot: int, admission: Admission) -> None:
        """A sequence enters its slot: settings to the table, what must be on the device there."""
        sampling = admission.sampling
        self._num_logprobs.pop(slot, None)
        self._scored_prompts.pop(slot, None)
        if sampling.logprobs is not None:
            self._num_logprobs[slot] = sampling.logprobs
        if sampling.prompt_logprobs is not None:
            self._scored_prompts[slot] = _ScoredPrompt(
                admission.prompt_token_ids, sampling.prompt_logprobs
            )
        self._sampling_table_RW[slot] = pack_sampling(sampling, default_seed=0)
        if needs_slot_row(sampling):
            row = slot_row(
                sampling,
                prompt_token_ids=admission.prompt_token_ids,
                output_token_ids=admission.output_token_ids,
                eos_token_ids=self.eos_token_ids,
                vocab_size=self.vocab_size,
            )
            self._state = self._programs.write_slot(
                self._state, self._put(np.int32(slot)), jax.tree.map(self._put, row)
            )

    def _wanted_logprobs(self, seqs: Sequence[ScheduledSeq]) -> Mapping[int, int]:
        """How many likeliest tokens are wanted beside the sampled one, by index in the step."""
        wanted = self._num_logprobs
        if not wanted:
            return _NOTHING
        return {
            index: wanted[seq.slot]
            for index, seq in enumerate(seqs)
            if seq.samples and seq.slot in wanted
        }

    def _prompt_chunks(self, seqs: Sequence[ScheduledSeq]) -> Mapping[int, PromptChunk]:
        """What the step must score of prompts, by index in the step."""
        if not self._scored_prompts:
            return _NOTHING
        chunks: dict[int, PromptChunk] = {}
        for index, seq in enumerate(seqs):
            prompt = self._scored_prompts.get(seq.slot)
            if prompt is None or seq.start >= len(prompt.token_ids):
                continue
            num_prompt, end = len(prompt.token_ids), seq.start + len(seq.token_ids)
            chunks[index] = PromptChunk(
                num_logprobs=prompt.num_logprobs,
                num_targets=min(end, num_prompt - 1) - seq.start,
                next_token=prompt.token_ids[end] if end < num_prompt else -1,
            )
        return chunks

    def _write_long_tables(
        self, seqs: Sequence[ScheduledSeq], bucket: Bucket
    ) -> Sequence[ScheduledSeq]:
        """Long prefix hits bring more pages than a step has room for: their rows go ahead of it.

        Returns the sequences with the pages that were written taken out.
        """
        room = num_page_updates(bucket, self.limits.page_size)
        num_new = sum(len(seq.new_pages) for seq in seqs)
        if num_new <= room:
            return seqs
        by_length = sorted(range(len(seqs)), key=lambda i: len(seqs[i].new_pages), reverse=True)
        remaining = list(seqs)
        for index in by_length:
            if num_new <= room:
                break
            seq = remaining[index]
            assert seq.first_new_page == 0, "only an admission brings many pages"
            row_M = np.zeros(self._state.page_table_RM.shape[1], np.int32)
            row_M[: len(seq.new_pages)] = seq.new_pages
            self._state = self._programs.write_pages(
                self._state, self._put(np.int32(seq.slot)), self._put(row_M)
            )
            num_new -= len(seq.new_pages)
            remaining[index] = msgspec.structs.replace(seq, new_pages=())
        return remaining


def _free(arrays: Any) -> None:
    """Deletes every array of a tree; those that are gone (donated) stay so."""
    for array in jax.tree.leaves(arrays):
        array.delete()


class PendingStep:
    """A dispatched step."""

    def __init__(
        self,
        step: ScheduledStep,
        result: StepResult,
        num_logprobs: Mapping[int, int],
        prompts: Mapping[int, PromptChunk],
    ) -> None:
        """Likeliest tokens wanted and parts of prompts to score, by index in the step."""
        self._step = step
        self._tokens_S = result.tokens_S
        self._num_logprobs = num_logprobs
        self._prompts = prompts
        self._logprobs = result.logprobs_SW if num_logprobs else None
        self._prompt_logprobs = result.prompt_logprobs_TW if prompts else None

    def start_transfers(self) -> None:
        """Has what `result` will read copied to the host as soon as it is there."""
        for array in jax.tree.leaves((self._tokens_S, self._logprobs, self._prompt_logprobs)):
            array.copy_to_host_async()

    def result(self) -> StepOutput:
        """Waits for the step and gives what it sampled."""
        tokens = np.asarray(self._tokens_S).tolist()
        if self._num_logprobs or self._prompts:
            outputs = self._with_logprobs(tokens)
        else:  # as nearly always: one tuple a sequence
            outputs = [
                SeqOutput([token] if seq.samples else [], _NO_LOGPROBS, _NO_LOGPROBS)
                for token, seq in zip(tokens, self._step.seqs, strict=False)  # (padding behind)
            ]
        if NO_TOKEN in tokens or self._num_logprobs or self._prompts:
            outputs = [
                msgspec.structs.replace(output, error=BROKEN_LOGITS)
                if _is_broken(output)
                else output
                for output in outputs
            ]
        return StepOutput(step_id=self._step.step_id, seqs=outputs)

    def _with_logprobs(self, tokens: Sequence[int]) -> list[SeqOutput]:
        logprobs = _to_host(self._logprobs)
        prompt_logprobs = _to_host(self._prompt_logprobs)
        outputs = []
        first_token = 0
        for index, seq in enumerate(self._step.seqs):
            own = [tokens[index]] if seq.samples else []
            wanted = self._num_logprobs.get(index)
            outputs.append(
                SeqOutput(
                    token_ids=own,
                    logprobs=_rows(logprobs, [index], own, wanted) if own else [],
                    prompt_logprobs=self._prompt_rows(prompt_logprobs, index, first_token),
                )
            )
            first_token += len(seq.token_ids)
        return outputs

    def _prompt_rows(
        self, logprobs: Logprobs | None, index: int, first_token: int
    ) -> list[TokenLogprobs]:
        chunk, seq = self._prompts.get(index), self._step.seqs[index]
        if chunk is None or logprobs is None:
            return []
        targets = [*seq.token_ids[1:], chunk.next_token][: chunk.num_targets]
        positions = range(first_token, first_token + len(targets))
        return _rows(logprobs, positions, targets, chunk.num_logprobs)


def _is_broken(output: SeqOutput) -> bool:
    """NaN logits show in the sampled token, or, masked or in mid-prompt, in log-probabilities."""
    if NO_TOKEN in output.token_ids:
        return True
    return any(
        math.isnan(value)
        for entry in (*output.logprobs, *output.prompt_logprobs)
        for value in entry.logprobs
    )


def _to_host(packed_NW: Array | None) -> Logprobs | None:
    return None if packed_NW is None else unpack_logprobs(np.asarray(packed_NW))


def _rows(
    logprobs: Logprobs | None,
    positions: Sequence[int],
    tokens: Sequence[int],
    num_wanted: int | None,
) -> list[TokenLogprobs]:
    """Rows of host arrays as TokenLogprobs: the token itself, then the likeliest."""
    if logprobs is None or num_wanted is None:
        return []
    return [
        TokenLogprobs(
            token_ids=[token, *logprobs.top_ids_NK[position, :num_wanted].tolist()],
            logprobs=[
                float(logprobs.token_logprob_N[position]),
                *logprobs.top_logprobs_NK[position, :num_wanted].tolist(),
            ],
            rank=int(logprobs.rank_N[position]),
        )
        for position, token in zip(positions, tokens, strict=True)
    ]
