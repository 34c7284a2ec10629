"""A device that needs none: the next token is a hash of all tokens before it and of the seed.

Stands in for the runner (and nothing else) in the tests of the engine. It keeps the state a device
keeps, one row a slot, and reads a PENDING_TOKEN from it, so a wrong schedule gives wrong tokens.
The functions at the end are factories for `runner_factory=`.
"""

import ctypes
import signal
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import (
    PENDING_TOKEN,
    ScheduledSeq,
    ScheduledStep,
    SeqOutput,
    StepOutput,
    TokenLogprobs,
)
from jaxinfer.errors import ConfigError

VOCAB_SIZE = 259  # 256 bytes and three special tokens, as in conftest's tokenizer
EOS = 256
FIRST_LETTER, NUM_LETTERS = ord("a"), 26
MAGIC_NAN_TOKEN = 258  # a prompt that begins with it makes the sequence fail alone


def next_token(token_ids: list[int], params: SamplingParams) -> int:
    """A letter; EOS in one of 64 cases. Greedy requests do not look at the seed."""
    seed = 0 if params.is_greedy else params.seed
    value = zlib.crc32(repr((seed, token_ids)).encode())
    return EOS if value % 64 == 0 else FIRST_LETTER + value // 64 % NUM_LETTERS


def expected_output(prompt: list[int], params: SamplingParams, max_tokens: int) -> list[int]:
    """What the engine must return for a request alone, EOS included."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, params))
        if tokens[-1] == EOS and not params.ignore_eos:
            break
    return tokens[len(prompt) :]


@dataclass(frozen=True, kw_only=True)
class FakePendingStep:
    output: StepOutput
    ready_time_s: float

    def result(self) -> StepOutput:
        time.sleep(max(0.0, self.ready_time_s - time.monotonic()))
        return self.output


class _Row(NamedTuple):
    params: SamplingParams
    tokens: list[int]
    num_prompt: int


class FakeRunner:
    def __init__(self, limits: EngineLimits, *, step_s: float = 0.0) -> None:
        self.limits = limits
        self.vocab_size = VOCAB_SIZE
        self.eos_token_ids = (EOS,)
        self.device_name = "fake"
        self.dtype = "float32"
        self.num_compiles_after_ready = 0
        self.is_closed = False
        self._step_s = step_s
        self._rows: dict[int, _Row] = {}
        self._device_free_time_s = 0.0

    def dispatch(self, step: ScheduledStep) -> FakePendingStep:
        assert not self.is_closed
        seqs = [self._run(seq) for seq in step.seqs]
        start_s = max(time.monotonic(), self._device_free_time_s)
        self._device_free_time_s = start_s + self._step_s
        return FakePendingStep(
            output=StepOutput(step_id=step.step_id, seqs=seqs),
            ready_time_s=self._device_free_time_s,
        )

    def reset(self) -> None:
        self._rows.clear()

    def close(self) -> None:
        self.is_closed = True

    def _run(self, seq: ScheduledSeq) -> SeqOutput:
        if seq.admission is not None:
            known = [*seq.admission.prompt_token_ids, *seq.admission.output_token_ids]
            num_prompt = len(seq.admission.prompt_token_ids)
            self._rows[seq.slot] = _Row(seq.admission.sampling, known, num_prompt)
        params, tokens, num_prompt = self._rows[seq.slot]
        end = seq.start + len(seq.token_ids)
        for position, token_id in enumerate(seq.token_ids, seq.start):
            if token_id == PENDING_TOKEN:
                assert position == len(tokens) - 1, "only the last token may be pending"
            elif position == len(tokens):
                tokens.append(token_id)
            else:
                assert tokens[position] == token_id
        if tokens[0] == MAGIC_NAN_TOKEN:
            tokens.append(0)
            return SeqOutput([], [], [], error="the logits are not finite")
        prompt_logprobs = []
        if params.prompt_logprobs is not None:
            shown = tokens[seq.start + 1 : min(end + 1, num_prompt)]
            prompt_logprobs = [_logprobs(token) for token in shown]
        if not seq.samples:
            return SeqOutput([], [], prompt_logprobs)
        token_id = next_token(tokens, params)
        tokens.append(token_id)
        logprobs = [] if params.logprobs is None else [_logprobs(token_id)]
        return SeqOutput([token_id], logprobs, prompt_logprobs)


def _logprobs(token_id: int) -> TokenLogprobs:
    """The token is the second most likely one."""
    others = [(token_id + 1) % VOCAB_SIZE, token_id, *range(20)]
    return TokenLogprobs([token_id, *others], [-1.0, -0.5, -1.0, *([-9.0] * 20)], 2)


Progress = Callable[[str, int, int], None]


def _limits(config: EngineConfig) -> EngineLimits:
    max_model_len = config.model.max_model_len or 64
    page_size = config.cache.block_size or 16
    return EngineLimits(
        max_num_seqs=config.scheduler.max_num_seqs or 8,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens or 32,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=config.cache.num_gpu_blocks_override or 8 * (-(-max_model_len // page_size)),
    )


def build_runner(config: EngineConfig, progress: Progress) -> FakeRunner:
    progress("load weights", 0, 2)
    progress("load weights", 2, 2)
    return FakeRunner(_limits(config))


def build_slow(config: EngineConfig, progress: Progress) -> FakeRunner:
    """20 ms a step: requests can be met in the middle of their work."""
    return FakeRunner(_limits(config), step_s=0.02)


def build_bad_config(config: EngineConfig, progress: Progress) -> FakeRunner:
    raise ConfigError("--max-model-len=99 is not for this model.")


def build_crash(config: EngineConfig, progress: Progress) -> FakeRunner:
    raise ZeroDivisionError("while loading")


def build_exit(config: EngineConfig, progress: Progress) -> FakeRunner:
    print("about to vanish", flush=True)
    raise SystemExit(7)


def build_never(config: EngineConfig, progress: Progress) -> FakeRunner:
    progress("hang", 0, 0)
    time.sleep(3600)
    raise AssertionError


class FailingRunner(FakeRunner):
    """Breaks in its fourth step, and for good."""

    def dispatch(self, step: ScheduledStep) -> FakePendingStep:
        if step.step_id == 3:
            raise RuntimeError("the device is on fire")
        return super().dispatch(step)

    def reset(self) -> None:
        raise RuntimeError("the device is lost")


def build_failing(config: EngineConfig, progress: Progress) -> FailingRunner:
    return FailingRunner(_limits(config))


class StallingRunner(FakeRunner):
    """Hangs in C, with Python's lock held and SIGTERM ignored, at a prompt that begins so."""

    STALL_BYTE = ord("~")

    def dispatch(self, step: ScheduledStep) -> FakePendingStep:
        for seq in step.seqs:
            if seq.admission and seq.admission.prompt_token_ids[0] == self.STALL_BYTE:
                self._hang_in_c()
        return super().dispatch(step)

    def _hang_in_c(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(3600)


def build_stalling(config: EngineConfig, progress: Progress) -> StallingRunner:
    return StallingRunner(_limits(config), step_s=0.02)


def build_if_allowed(config: EngineConfig, progress: Progress) -> FakeRunner:
    """Vanishes, or hangs, while it loads if a file beside the model says so."""
    if Path(config.model.model, "die").exists():
        raise SystemExit(7)
    if Path(config.model.model, "hang").exists():
        Path(config.model.model, "hanging").touch()
        build_never(config, progress)
    return build_slow(config, progress)
