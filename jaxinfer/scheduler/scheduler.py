"""Decides who computes what in each step. Knows requests, pages and slots; no device, no text.

There is no prefill phase and no decode phase. Every running sequence has computed tokens that must
catch up with its total; a step hands out a budget of tokens: first to the sequences that lack one
token (decodes), then to longer ones in chunks, then to waiting requests while slots, pages and
budget last. Everything is decided in order of rank (queue.py), so whoever ranks first always moves.

Pages. A request is admitted only if all its known tokens fit, with a spare page for each running
sequence to grow into; afterwards it grows by a page now and then. When none is free, the running
sequence of the last rank is preempted: its pages are freed, it waits at its old rank and recomputes
(the part that is still in the prefix cache comes for free). Only sequences that rank behind the one
in need are preempted; the last one itself just waits.

Equal prompts. A newcomer that could share many tokens which a running sequence is just computing
waits until they are published: siblings of n > 1 do not compute their prompt n times.

Asynchrony. `schedule` may be called for step N+1 before `update` for step N. A sequence that
samples in N then has one pending token, known to the device only, and is continued from it. What
ends in N by a stop token has a useless share of N+1, whose result is dropped. Its pages may be
given away at once, because the device runs steps in order; pages are published at `update`, when
their tokens are known and computed.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping

from jaxinfer.core.messages import EngineStats, SequenceUpdate
from jaxinfer.core.request import FinishReason, Request, RequestStatus
from jaxinfer.core.step import Admission, ScheduledStep, StepOutput
from jaxinfer.errors import QueueFullError, RequestError
from jaxinfer.kv_cache.layout import num_pages_for
from jaxinfer.kv_cache.manager import KVCacheManager
from jaxinfer.scheduler.limits import SchedulerLimits
from jaxinfer.scheduler.queue import WaitingQueue, make_rank
from jaxinfer.scheduler.results import apply_result, fail_request, finish
from jaxinfer.scheduler.sequence import RunningSet, SequenceState, make_state
from jaxinfer.scheduler.step_builder import InFlightStep, StepBuilder
from jaxinfer.scheduler.stop import Stop

MAX_STEPS_IN_FLIGHT = 2


def _make_kv(limits: SchedulerLimits) -> KVCacheManager:
    return KVCacheManager(
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        enable_prefix_caching=limits.enable_prefix_caching,
    )


class Scheduler:
    """All requests of one engine. Not thread-safe: one loop owns it."""

    def __init__(
        self, limits: SchedulerLimits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._kv = _make_kv(limits)
        self._states: dict[str, SequenceState] = {}  # all that are not finished
        self._held: dict[str, SequenceState] = {}  # those of them that may not run for now
        self._holds_arrivals = False
        self._waiting: WaitingQueue[SequenceState] = WaitingQueue()
        self._running = RunningSet(limits.max_num_seqs)
        self._in_flight: deque[InFlightStep] = deque()
        self._max_chunk = limits.long_prefill_token_threshold or limits.max_num_batched_tokens
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_preemptions = 0

    # Requests come and go.

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError if it could never run, QueueFullError if the
        queue is at its limit."""
        self._check_can_run(request)
        num_waiting = len(self._waiting) + len(self._held)
        if num_waiting >= self.limits.max_num_queued:
            raise QueueFullError(
                f"{num_waiting} requests are waiting, the limit is "
                f"{self.limits.max_num_queued} (--max-num-queued-reqs); try again later."
            )
        rank = make_rank(self.limits.policy, priority=request.priority, arrival=self._num_arrivals)
        self._num_arrivals += 1
        state = make_state(request, rank)
        self._states[request.request_id] = state
        if self._holds_arrivals:
            self._held[request.request_id] = state
        else:
            self._waiting.push(rank, state)

    def abort(self, request_ids: Iterable[str]) -> list[Request]:
        """Ends requests wherever they are and frees what they hold; unknown ids are ignored.
        Returns the requests that were ended. No update will mention them again."""
        aborted: list[Request] = []
        for request_id in request_ids:
            state = self._states.get(request_id)
            if state is not None:
                self._remove(state)
                finish(state.request, Stop(FinishReason.ABORT))
                aborted.append(state.request)
        return aborted

    @property
    def has_unfinished(self) -> bool:
        """Whether any request still waits for tokens."""
        return bool(self._states)

    @property
    def unfinished(self) -> Mapping[str, Request]:
        """By id, all that still wait for tokens."""
        return {name: state.request for name, state in self._states.items()}

    # Faults (engine/recovery.py).

    def restart(self) -> None:
        """The device has lost everything: all requests wait again, to be computed anew.

        Steps in flight are forgotten. What is between requests is made anew too: the step that
        failed may have been half scheduled.
        """
        self._in_flight.clear()
        self._kv = _make_kv(self.limits)
        self._running = RunningSet(self.limits.max_num_seqs)
        self._waiting = WaitingQueue()
        self._held.clear()
        for state in self._states.values():
            state.lose_place()
            self._waiting.push(state.rank, state)

    def run_only(self, request_ids: Collection[str]) -> None:
        """Only these may run until `run_all`; newcomers wait aside too. No step is in flight."""
        assert not self._in_flight, "a step in flight would run others"
        for state in list(self._running):
            if state.request.request_id not in request_ids:
                self._preempt(state)
        everyone = self._held | {s.request.request_id: s for s in self._waiting}
        self._held.clear()
        self._waiting = WaitingQueue()
        for request_id, state in everyone.items():
            if request_id in request_ids:
                self._waiting.push(state.rank, state)
            else:
                self._held[request_id] = state
        self._holds_arrivals = True

    def run_all(self) -> None:
        """Ends `run_only`."""
        self._holds_arrivals = False
        for state in self._held.values():
            self._waiting.push(state.rank, state)
        self._held.clear()

    def fail(self, request_id: str, error: str) -> SequenceUpdate:
        """Ends a request that waits with finish reason "error"; returns its news."""
        state = self._states[request_id]
        self._remove(state)
        return fail_request(state, error)

    def reset_prefix_cache(self) -> None:
        """No request will find what was computed before this call."""
        self._kv.reset_prefix_cache()

    def stats(self) -> EngineStats:
        """The scheduler's part of the engine's figures."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + len(self._held),
            kv_usage=1.0 - self._kv.num_free_pages / self._kv.num_pages,
            num_steps_total=self._num_steps,
            prefix_queries_total=self._num_prefix_queries,
            prefix_hits_total=self._num_prefix_hits,
            num_preemptions_total=self._num_preemptions,
        )

    # One step.

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None when nothing can be computed before another `update`."""
        assert len(self._in_flight) < MAX_STEPS_IN_FLIGHT, "update() of an older step is due"
        builder = StepBuilder(
            step_id=self._num_steps, num_budget_tokens=self.limits.max_num_batched_tokens
        )
        # Running sequences short of a page show that there are none for newcomers.
        if self._schedule_running(builder):
            self._schedule_waiting(builder)
        in_flight = builder.build()
        if in_flight is None:
            return None
        self._num_steps += 1
        self._in_flight.append(in_flight)
        return in_flight.step

    def update(self, step: ScheduledStep, output: StepOutput) -> list[SequenceUpdate]:
        """Takes in the results of the oldest step in flight; returns the news of its sequences."""
        in_flight = self._in_flight.popleft()
        assert step.step_id == in_flight.step.step_id == output.step_id, "steps end out of order"
        updates: list[SequenceUpdate] = []
        for state, seq, result in zip(in_flight.states, step.seqs, output.seqs, strict=True):
            request = state.request
            if request.status is RequestStatus.FINISHED:
                continue  # it was aborted, or the step before ended it
            if request.status is RequestStatus.RUNNING:  # (a preempted one has lost its pages)
                self._kv.publish(state.pages, seq.start + len(seq.token_ids))
            update = apply_result(state, seq, result)
            if update is not None:
                updates.append(update)
            if request.finish_reason is not None:
                self._remove(state, is_broken=result.error is not None)
        return updates

    def check_integrity(self) -> None:
        """Asserts that no page, slot or request is lost or held twice. For tests."""
        self._running.check_integrity()
        self._kv.check_integrity(state.pages for state in self._states.values())
        running = set(self._running)
        num_waiting = len(self._waiting) + len(self._held)
        assert len(self._running) + num_waiting == len(self._states)
        for request_id, state in self._states.items():
            request = state.request
            assert request.request_id == request_id
            is_running = request.status is RequestStatus.RUNNING
            assert is_running == (state in running) == bool(state.pages.pages)
            assert is_running or request.num_computed_tokens == 0
            assert request.num_computed_tokens <= request.num_tokens_with_pending
            capacity = len(state.pages.pages) * self.limits.page_size
            assert request.num_computed_tokens <= capacity, "computed tokens have no page"
            assert 0 <= request.num_pending_tokens <= len(self._in_flight)

    # Parts of the above.

    def _check_can_run(self, request: Request) -> None:
        if request.request_id in self._states:
            raise RequestError(
                f"request_id {request.request_id!r} is in use; give each request its own.",
                param="request_id",
            )
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty; it needs at least one token.", param="prompt")
        num_prompt, limits = request.num_prompt_tokens, self.limits
        if num_prompt + request.max_tokens > limits.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}; "
                f"together they must not exceed the context of {limits.max_model_len} tokens. "
                "Shorten the prompt or lower max_tokens.",
                param="max_tokens",
            )
        # The last token is never computed, so it needs no place in the cache.
        num_cached = num_prompt + max(request.max_tokens - 1, 0)
        if num_pages_for(num_cached, limits.page_size) > limits.num_pages:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}, but "
                f"the KV cache holds {limits.num_pages * limits.page_size} tokens "
                f"({limits.num_pages} pages of {limits.page_size}). Shorten the prompt, lower "
                "max_tokens, or serve with a larger --kv-cache-memory-bytes.",
                param="max_tokens",
            )

    def _schedule_running(self, builder: StepBuilder) -> bool:
        """Decodes, then chunks. Returns whether all got the pages they need."""
        chunks: list[SequenceState] = []
        num_preemptions = self._num_preemptions
        is_short = False  # only the last one can be: whoever ranks before it takes its pages
        index = 0
        while index < len(self._running):  # victims leave at the end, never before `index`
            state = self._running[index]
            index += 1
            request = state.request
            num_pending = request.num_pending_tokens
            if num_pending:  # all but the pending token is computed
                if len(request.output_token_ids) + num_pending >= request.max_tokens:
                    continue  # the step in flight ends it
            elif request.num_tokens - request.num_computed_tokens > 1:
                chunks.append(state)  # it has all its pages since it was admitted
                continue
            is_short = not self._schedule_decode(builder, state)
        for state in chunks:  # none was a victim: those rank behind every sequence looked at
            if builder.num_tokens_left:
                self._add_chunk(builder, state)
        return not is_short and num_preemptions == self._num_preemptions

    def _schedule_decode(self, builder: StepBuilder, state: SequenceState) -> bool:
        """Gives the next token its place, at the cost of lower ranks; False if there is none."""
        num_tokens = state.request.num_computed_tokens + 1
        while (new_pages := self._kv.grow(state.pages, num_tokens)) is None:
            victim = self._running[-1]
            if victim is state:
                return False
            self._preempt(victim)
        builder.add(state, num_tokens=1, new_pages=new_pages)
        return True

    def _schedule_waiting(self, builder: StepBuilder) -> None:
        aside: list[SequenceState] = []
        while (
            self._waiting
            and not self._running.is_full
            and builder.num_tokens_left
            and len(aside) < self.limits.max_num_seqs  # (looking at each takes time)
        ):
            state = self._waiting.pop()
            if self._gains_by_waiting(state):
                aside.append(state)  # for a few steps, so others may overtake it
                continue
            if not self._admit(state):
                aside.append(state)
                break  # nobody overtakes it: it would starve
            request = state.request
            admission = Admission(
                sampling=request.sampling,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=tuple(request.output_token_ids),
            )
            self._add_chunk(builder, state, admission=admission)
        for state in aside:
            self._waiting.push(state.rank, state)

    def _gains_by_waiting(self, state: SequenceState) -> bool:
        """Whether others compute much of its prompt just now: equal prompts, siblings of n > 1."""
        num_tokens = self._kv.num_tokens_promised(state.pages, state.max_hit_tokens)
        return num_tokens >= self.limits.min_tokens_to_wait_for

    def _admit(self, state: SequenceState) -> bool:
        """Gives a waiting sequence pages and a slot, or changes nothing."""
        request = state.request
        assert request.num_pending_tokens == 0, "its last token is still on the device"
        num_hit_tokens = self._kv.admit(
            state.pages,
            num_tokens=request.num_tokens,
            max_hit_tokens=state.max_hit_tokens,
            num_spare_pages=len(self._running),
        )
        if num_hit_tokens is None:
            return False
        self._running.add(state)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_hit_tokens
        if request.num_cached_tokens < 0:  # (a resumed request mostly finds its own pages)
            request.num_cached_tokens = num_hit_tokens
            request.first_scheduled_time_s = self._clock()
            if state.max_hit_tokens > 0 and self.limits.enable_prefix_caching:
                self._num_prefix_queries += request.num_tokens
                self._num_prefix_hits += num_hit_tokens
        return True

    def _add_chunk(
        self, builder: StepBuilder, state: SequenceState, *, admission: Admission | None = None
    ) -> None:
        request = state.request
        num_tokens = request.num_tokens - request.num_computed_tokens
        builder.add(
            state,
            num_tokens=min(num_tokens, self._max_chunk, builder.num_tokens_left),
            new_pages=tuple(state.pages.pages) if admission is not None else (),
            admission=admission,
        )

    def _preempt(self, state: SequenceState) -> None:
        self._running.remove(state)
        self._kv.release(state.pages)
        state.request.status = RequestStatus.PREEMPTED
        state.request.num_computed_tokens = 0
        state.request.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.push(state.rank, state)

    def _remove(self, state: SequenceState, *, is_broken: bool = False) -> None:
        """Takes an unfinished sequence out of everything. The content of its pages is forgotten
        if it is broken."""
        if state.slot is not None:
            self._running.remove(state)
        elif self._held.pop(state.request.request_id, None) is None:
            self._waiting.remove(state.rank)
        if is_broken:
            self._kv.discard(state.pages)
        else:
            self._kv.release(state.pages)
        del self._states[state.request.request_id]
