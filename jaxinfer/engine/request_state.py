"""One request on the client's side: its n sequences, its times, what its consumer has not seen.

Must not know other requests, event loops, sockets or HTTP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from jaxinfer.core.messages import SequenceUpdate
from jaxinfer.core.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.inputs import ValidatedPrompt
from jaxinfer.engine.sequence_output import SequenceOutput, logprob_entry
from jaxinfer.logging import get_logger
from jaxinfer.tokenizer.tokenizer import Tokenizer

logger = get_logger(__name__)

OutputKind = Literal["delta", "cumulative", "final"]


class TokensEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence of a request has new tokens. (A Struct: it is made for every token.)"""

    request_id: str
    num_tokens: int
    is_first: bool
    latency_s: float  # since the tokens before; since arrival for the first


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedEvent:
    """A request has ended, or its user has gone (finish reason "abort")."""

    request_id: str
    finish_reasons: tuple[str, ...]  # one per sequence
    params: SamplingParams
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int  # of all sequences
    longest_output_tokens: int  # of the longest sequence
    metrics: RequestMetrics


OnTokens = Callable[[TokensEvent], None]
OnFinished = Callable[[FinishedEvent], None]
OnStep = Callable[[int], None]
"""A step of the core has ended; it computed this many tokens."""


class RequestState:
    """A request on its way. Output collects here until its consumer takes it: however slow the
    consumer, what waits for it is one output."""

    def __init__(
        self,
        request_id: str,
        sequence_ids: list[str],
        prompt: ValidatedPrompt,
        tokenizer: Tokenizer,
        *,
        output_kind: OutputKind,
        arrival_time_s: float,
    ) -> None:
        self.request_id = request_id
        self.sequence_ids = sequence_ids
        self.prompt = prompt
        self.output_kind: OutputKind = output_kind
        self.num_cached_tokens: int | None = None
        self.metrics = RequestMetrics(arrival_time_s=arrival_time_s)
        self.sequences = [
            SequenceOutput(index, prompt.prompt_token_ids, prompt.params, tokenizer)
            for index in range(len(sequence_ids))
        ]
        self._num_unfinished = len(sequence_ids)
        self._tokenizer = tokenizer if prompt.params.detokenize else None
        self._last_token_time_s = [arrival_time_s] * len(sequence_ids)
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if prompt.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]  # nothing predicts the first token

    @property
    def is_finished(self) -> bool:
        return self._num_unfinished == 0

    @property
    def open_sequence_ids(self) -> list[str]:
        return [
            sequence_id
            for sequence_id, sequence in zip(self.sequence_ids, self.sequences, strict=True)
            if not sequence.is_finished
        ]

    def add(self, index: int, update: SequenceUpdate, now_s: float) -> bool:
        """Takes news of sequence `index`, which has not finished; True when the core must be told
        to stop it."""
        if update.num_cached_tokens and not self.num_cached_tokens:
            self.num_cached_tokens = update.num_cached_tokens
        if update.queue_time_s is not None and self.metrics.queue_time_s is None:
            self.metrics.queue_time_s = update.queue_time_s
        if update.new_token_ids:
            if self.metrics.first_token_time_s is None:
                self.metrics.first_token_time_s = now_s
            self.metrics.last_token_time_s = now_s
        if update.prompt_logprobs:
            self._add_prompt_logprobs(update)
        if update.error is not None:
            logger.error("request %s ended with an error: %s", self.request_id, update.error)
        sequence = self.sequences[index]
        stop_core = sequence.add(update)
        if sequence.finish_reason is not None:
            self._num_unfinished -= 1
            if self._num_unfinished == 0:
                self.metrics.finished_time_s = now_s
        return stop_core

    def token_latency_s(self, index: int, now_s: float) -> float:
        """Seconds since the last call for this sequence (since arrival at first)."""
        latency_s = now_s - self._last_token_time_s[index]
        self._last_token_time_s[index] = now_s
        return latency_s

    def abort(self, now_s: float) -> None:
        for sequence in self.sequences:
            if not sequence.is_finished:
                sequence.abort()
        self._num_unfinished = 0
        self.metrics.finished_time_s = now_s

    def take(self) -> RequestOutput | None:
        """What the consumer has not seen yet, shaped by the output kind; None for nothing new."""
        if self.output_kind == "final" and not self.is_finished:
            return None
        fresh = [sequence for sequence in self.sequences if sequence.has_news]
        if not fresh:
            return None
        if self.output_kind != "delta":
            return self._make_output([sequence.snapshot() for sequence in self.sequences])
        output = self._make_output([sequence.take_delta() for sequence in fresh])
        self._prompt_logprobs = None  # complete before the first token: handed out once
        return output

    def finished_event(self) -> FinishedEvent:
        return FinishedEvent(
            request_id=self.request_id,
            finish_reasons=tuple(sequence.finish_reason or "" for sequence in self.sequences),
            params=self.prompt.params,
            num_prompt_tokens=len(self.prompt.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens or 0,
            num_output_tokens=sum(sequence.num_tokens for sequence in self.sequences),
            longest_output_tokens=max(sequence.num_tokens for sequence in self.sequences),
            metrics=self.metrics,
        )

    def _make_output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=outputs,
            finished=self.is_finished,
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics,
        )

    def _add_prompt_logprobs(self, update: SequenceUpdate) -> None:
        num_top = self.prompt.params.prompt_logprobs
        if self._prompt_logprobs is None or num_top is None or update.prompt_logprobs is None:
            return
        self._prompt_logprobs += [
            logprob_entry(entry, num_top, self._tokenizer) for entry in update.prompt_logprobs
        ]
