"""Runs scheduled steps on the device: the only place where host and device state meet.

`dispatch` packs a step, puts it on the device and returns at once; the result is fetched when
somebody asks. Device memory (pages, slot state) is donated from step to step. Knows no requests:
what it must remember of a sequence, it keeps by slot.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import msgspec
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import ScheduledSeq, ScheduledStep, SeqOutput, StepOutput, TokenLogprobs
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


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Everything the runner calls, compiled."""

    steps: Mapping[Bucket, Compiled]
    write_slot: Compiled  # (state, slot, SlotRow) -> state
    write_pages: Compiled  # (state, slot, page ids [M]) -> state


class DeviceArrays(NamedTuple):
    """What lives on the devices."""

    weights: tuple[Array, ...]
    pages_L: tuple[Array, ...]
    state: DeviceState


class Vocabulary(NamedTuple):
    """What the engine must know of the tokens."""

    size: int
    eos_token_ids: tuple[int, ...]


class _Slot(NamedTuple):
    """What the host remembers of the sequence in a slot."""

    sampling: SamplingParams
    prompt_token_ids: Sequence[int]


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
        self._weights, self._pages_L, self._state = arrays
        self._counter = counter
        self._on_every_device = replicated(mesh)
        self._sampling_table_RW = np.zeros((limits.max_num_seqs, NUM_WORDS), np.int32)
        self._slots: dict[int, _Slot] = {}

    @property
    def num_compiles_after_ready(self) -> int:
        return self._counter.num_after_ready

    def dispatch(self, step: ScheduledStep) -> "PendingStep":
        """Puts a step on the device; returns before it is done."""
        for seq in step.seqs:
            self._admit(seq)
        prompts = [self._prompt_chunk(seq) for seq in step.seqs]
        bucket = choose_bucket(
            self.buckets,
            num_tokens=step.num_tokens,
            num_seqs=len(step.seqs),
            decode_only=step.num_tokens == len(step.seqs) and not any(prompts),
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
        num_logprobs = [
            self._slots[seq.slot].sampling.logprobs if seq.samples else None for seq in step.seqs
        ]
        return PendingStep(step, result, num_logprobs, prompts)

    def close(self) -> None:
        """Frees the device memory."""
        for array in jax.tree.leaves((self._weights, self._pages_L, self._state)):
            array.delete()

    def _put(self, array: np.ndarray | np.generic) -> Array:
        return jax.device_put(array, self._on_every_device)

    def _admit(self, seq: ScheduledSeq) -> None:
        """A sequence enters its slot: settings to the table, what must be on the device there."""
        admission = seq.admission
        if admission is None:
            return
        sampling = admission.sampling
        self._slots[seq.slot] = _Slot(sampling, admission.prompt_token_ids)
        self._sampling_table_RW[seq.slot] = pack_sampling(sampling, default_seed=0)
        if needs_slot_row(sampling):
            row = slot_row(
                sampling,
                prompt_token_ids=admission.prompt_token_ids,
                output_token_ids=admission.output_token_ids,
                eos_token_ids=self.eos_token_ids,
                vocab_size=self.vocab_size,
            )
            self._state = self._programs.write_slot(
                self._state, self._put(np.int32(seq.slot)), jax.tree.map(self._put, row)
            )

    def _prompt_chunk(self, seq: ScheduledSeq) -> PromptChunk | None:
        """What the step must score of the sequence's prompt, if anything."""
        slot = self._slots[seq.slot]
        wanted = slot.sampling.prompt_logprobs
        num_prompt = len(slot.prompt_token_ids)
        if wanted is None or seq.start >= num_prompt:
            return None
        end = seq.start + len(seq.token_ids)
        return PromptChunk(
            num_logprobs=wanted,
            num_targets=min(end, num_prompt - 1) - seq.start,
            next_token=slot.prompt_token_ids[end] if end < num_prompt else -1,
        )

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


class PendingStep:
    """A dispatched step; its transfers to the host have been started."""

    def __init__(
        self,
        step: ScheduledStep,
        result: StepResult,
        num_logprobs: Sequence[int | None],
        prompts: Sequence[PromptChunk | None],
    ) -> None:
        self._step = step
        self._tokens_S = result.tokens_S
        self._num_logprobs = num_logprobs
        self._prompts = prompts
        wants_logprobs = any(number is not None for number in num_logprobs)
        self._logprobs = result.logprobs_SW if wants_logprobs else None
        self._prompt_logprobs = result.prompt_logprobs_TW if any(prompts) else None
        for array in jax.tree.leaves((self._tokens_S, self._logprobs, self._prompt_logprobs)):
            array.copy_to_host_async()

    def result(self) -> StepOutput:
        """Waits for the step and gives what it sampled."""
        tokens = np.asarray(self._tokens_S).tolist()
        logprobs = _to_host(self._logprobs)
        prompt_logprobs = _to_host(self._prompt_logprobs)
        outputs = []
        first_token = 0
        for index, seq in enumerate(self._step.seqs):
            output = SeqOutput(
                token_ids=[tokens[index]] if seq.samples else [],
                logprobs=_rows(logprobs, [index], [tokens[index]], self._num_logprobs[index]),
                prompt_logprobs=self._prompt_rows(prompt_logprobs, index, first_token),
            )
            outputs.append(output._replace(error=BROKEN_LOGITS) if _is_broken(output) else output)
            first_token += len(seq.token_ids)
        return StepOutput(step_id=self._step.step_id, seqs=outputs)

    def _prompt_rows(
        self, logprobs: Logprobs | None, index: int, first_token: int
    ) -> list[TokenLogprobs]:
        chunk, seq = self._prompts[index], self._step.seqs[index]
        if chunk is None or logprobs is None:
            return []
        targets = [*seq.token_ids[1:], chunk.next_token][: chunk.num_targets]
        positions = range(first_token, first_token + len(targets))
        return _rows(logprobs, positions, targets, chunk.num_logprobs)


def _is_broken(output: SeqOutput) -> bool:
    """NaN logits show in the sampled token, or, masked or in mid-prompt, in log-probabilities."""
    if NO_TOKEN in output.token_ids:
        return True
    if not (output.logprobs or output.prompt_logprobs):  # as in nearly every step
        return False
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
