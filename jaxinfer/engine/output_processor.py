"""From the core's messages to what users get; all open requests of one client.

Used alike by AsyncEngine and LLM. Must not know event loops, sockets or HTTP.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

from jaxinfer.core.messages import AddRequest, StepUpdate
from jaxinfer.engine.fan_out import RequestIds, SeedSource, fan_out
from jaxinfer.engine.inputs import ValidatedPrompt
from jaxinfer.engine.request_state import (
    OnFinished,
    OnStep,
    OnTokens,
    OutputKind,
    RequestState,
    TokensEvent,
)
from jaxinfer.tokenizer.tokenizer import Tokenizer


class Processed(NamedTuple):
    """What an update meant."""

    changed: list[RequestState]  # requests with news, each once
    aborts: list[str]  # sequences that a stop string ended: the core must be told


class NewRequest(NamedTuple):
    state: RequestState
    messages: list[AddRequest]  # to be sent to the core


class _Sequence(NamedTuple):
    state: RequestState
    position: int  # among the request's sequences


class OutputProcessor:
    """Holds the requests that are open, by sequence."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        next_seed: SeedSource,
        on_tokens: OnTokens | None = None,
        on_finished: OnFinished | None = None,
    ) -> None:
        self.on_tokens = on_tokens
        self.on_finished = on_finished
        self.on_step: OnStep | None = None
        self._tokenizer = tokenizer
        self._next_seed = next_seed
        self._ids = RequestIds()
        self._sequences: dict[str, _Sequence] = {}
        self._num_open = 0

    @property
    def num_open(self) -> int:
        """Requests (not sequences) that have not ended."""
        return self._num_open

    @property
    def num_open_sequences(self) -> int:
        return len(self._sequences)

    def open_requests(self) -> Iterator[RequestState]:
        """Each open request once."""
        return iter({id(state): state for state, _ in self._sequences.values()}.values())

    def add(
        self,
        request_id: str,
        prompt: ValidatedPrompt,
        *,
        output_kind: OutputKind,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> NewRequest:
        """Opens a request."""
        now_s = time.monotonic()
        params = prompt.params
        sequence_ids = self._ids.new(request_id, params.n)
        state = RequestState(
            request_id,
            sequence_ids,
            prompt,
            self._tokenizer,
            output_kind=output_kind,
            arrival_time_s=now_s,
        )
        for index, sequence_id in enumerate(sequence_ids):
            self._sequences[sequence_id] = _Sequence(state, index)
        self._num_open += 1
        messages = fan_out(
            sequence_ids,
            prompt.prompt_token_ids,
            params,
            arrival_time_s=now_s,
            next_seed=self._next_seed,
            priority=priority,
            cache_salt=cache_salt,
        )
        return NewRequest(state, messages)

    def find(self, sequence_id: str) -> RequestState | None:
        """The open request that a sequence belongs to."""
        entry = self._sequences.get(sequence_id)
        return None if entry is None else entry.state

    def process(self, update: StepUpdate) -> Processed:
        """Takes in one step's news. Those of requests that are gone are ignored."""
        if self.on_step is not None and update.num_tokens:
            self.on_step(update.num_tokens)
        now_s = time.monotonic()
        changed: dict[int, RequestState] = {}
        aborts: list[str] = []
        for news in update.sequences:
            entry = self._sequences.get(news.request_id)
            if entry is None:
                continue
            state, index = entry
            sequence = state.sequences[index]
            is_first = not sequence.num_tokens
            if state.add(index, news, now_s):
                aborts.append(news.request_id)
            if news.new_token_ids:
                self._report_tokens(state, index, len(news.new_token_ids), now_s, is_first=is_first)
            if sequence.finish_reason is not None:
                del self._sequences[news.request_id]
                if state.is_finished:
                    self._close(state)
            changed[id(state)] = state
        return Processed(list(changed.values()), aborts)

    def abort(self, state: RequestState) -> list[str]:
        """Ends a request on the user's wish; returns the sequences that the core must stop."""
        sequence_ids = self.forget(state)
        if sequence_ids:
            state.abort(time.monotonic())
            self._report_finished(state)
        return sequence_ids

    def forget(self, state: RequestState) -> list[str]:
        """Drops a request without a word (it failed); returns its open sequences."""
        sequence_ids = [name for name in state.open_sequence_ids if name in self._sequences]
        for sequence_id in sequence_ids:
            del self._sequences[sequence_id]
        if sequence_ids:
            self._num_open -= 1
        return sequence_ids

    def _close(self, state: RequestState) -> None:
        self._num_open -= 1
        self._report_finished(state)

    def _report_tokens(
        self, state: RequestState, index: int, num_tokens: int, now_s: float, *, is_first: bool
    ) -> None:
        latency_s = state.token_latency_s(index, now_s)
        if self.on_tokens is not None:
            self.on_tokens(
                TokensEvent(
                    request_id=state.request_id,
                    num_tokens=num_tokens,
                    is_first=is_first,
                    latency_s=latency_s,
                )
            )

    def _report_finished(self, state: RequestState) -> None:
        if self.on_finished is not None:
            self.on_finished(state.finished_event())
