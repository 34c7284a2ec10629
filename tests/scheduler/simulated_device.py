"""A device and a model small enough to check every page: the oracle of the scheduler's tests.

The KV memory is real in miniature: each computed token writes (token, position) into its page,
and sampling reads the whole sequence back through the slot's page table. The "model" is a hash of
what it reads, so a stale, shared or lost page changes the output (or trips the position check).
"""

import zlib
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxinfer.core.messages import SequenceUpdate
from jaxinfer.core.request import FinishReason, Request, RequestStatus
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import (
    PENDING_TOKEN,
    ScheduledSeq,
    ScheduledStep,
    SeqOutput,
    StepOutput,
    TokenLogprobs,
)
from jaxinfer.scheduler.limits import SchedulerLimits
from jaxinfer.scheduler.scheduler import Scheduler

VOCAB_SIZE = 13
EOS = 0


def fingerprint(tokens: Sequence[int]) -> int:
    return zlib.crc32(array("i", tokens).tobytes())


def next_token(tokens: Sequence[int]) -> int:
    return fingerprint(tokens) % VOCAB_SIZE


def make_limits(**changes) -> SchedulerLimits:
    numbers = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "page_size": 4,
        "num_pages": 32,
    }
    return SchedulerLimits(**{**numbers, **changes})


def make_request(request_id: str, prompt: Sequence[int], max_tokens: int = 8, **fields) -> Request:
    own = {name: fields.pop(name) for name in ("priority", "cache_salt") if name in fields}
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **fields}),
        eos_token_ids=(EOS,),
        max_tokens=max_tokens,
        arrival_time_s=0.0,
        **own,
    )


@dataclass
class Expected:
    """What a request must give when it runs alone on a machine without limits."""

    token_ids: list[int]
    finish_reason: str
    stop_reason: int | None
    prompt_logprobs: list[float]


def run_alone(request: Request) -> Expected:
    sampling, prompt = request.sampling, request.prompt_token_ids
    logprobs = []
    if sampling.prompt_logprobs is not None:
        logprobs = [float(fingerprint(prompt[:i])) for i in range(1, len(prompt))]
    output: list[int] = []
    while len(output) < request.max_tokens:
        token = next_token([*prompt, *output])
        output.append(token)
        if len(output) >= sampling.min_tokens:
            if token in request.eos_token_ids and not sampling.ignore_eos:
                return Expected(output, "stop", None, logprobs)
            if token in sampling.stop_token_ids:
                return Expected(output, "stop", token, logprobs)
    return Expected(output, "length", None, logprobs)


@dataclass
class Slot:
    request_id: str
    prompt: Sequence[int]
    wants_prompt_logprobs: bool
    pages: list[int]
    last_token: int | None


@dataclass
class SimulatedDevice:
    """Runs steps in the order of dispatch; trusts nothing the scheduler says."""

    limits: SchedulerLimits
    breaks_at: Mapping[str, int]  # request id -> output index at which its numbers are NaN

    def __post_init__(self) -> None:
        page_size, num_pages = self.limits.page_size, self.limits.num_pages
        self.memory = [[(-1, -1)] * page_size for _ in range(num_pages)]
        self.slots: dict[int, Slot] = {}

    def run(self, step: ScheduledStep) -> StepOutput:
        lengths = [len(seq.token_ids) for seq in step.seqs]
        assert step.num_tokens == sum(lengths) <= self.limits.max_num_batched_tokens
        assert 0 < len(step.seqs) <= self.limits.max_num_seqs
        assert len({seq.slot for seq in step.seqs}) == len(step.seqs)
        is_single = [length == 1 for length in lengths]
        assert is_single == sorted(is_single, reverse=True), "decodes are not a prefix"
        for seq in step.seqs:
            self._bind_slot(seq)
        # Backwards, so that whoever relies on a page of another one's in the same step gets junk.
        outputs = [self._run_seq(seq) for seq in reversed(step.seqs)]
        return StepOutput(step_id=step.step_id, seqs=outputs[::-1])

    def _bind_slot(self, seq: ScheduledSeq) -> None:
        assert 0 <= seq.slot < self.limits.max_num_seqs
        if seq.admission is not None:
            known = [*seq.admission.prompt_token_ids, *seq.admission.output_token_ids]
            assert seq.first_new_page == 0
            assert known[seq.start : seq.start + len(seq.token_ids)] == list(seq.token_ids)
            self.slots[seq.slot] = Slot(
                request_id=seq.request_id,
                prompt=seq.admission.prompt_token_ids,
                wants_prompt_logprobs=seq.admission.sampling.prompt_logprobs is not None,
                pages=list(seq.new_pages),
                last_token=None,
            )
            return
        slot = self.slots[seq.slot]
        assert slot.request_id == seq.request_id
        assert seq.first_new_page == len(slot.pages)
        slot.pages += seq.new_pages

    def _run_seq(self, seq: ScheduledSeq) -> SeqOutput:
        slot, page_size = self.slots[seq.slot], self.limits.page_size
        end = seq.start + len(seq.token_ids)
        for position, token in enumerate(seq.token_ids, seq.start):
            if token == PENDING_TOKEN:
                assert position == end - 1
                assert slot.last_token is not None
                token = slot.last_token
            self.memory[slot.pages[position // page_size]][position % page_size] = (token, position)
        context = [self.memory[slot.pages[i // page_size]][i % page_size] for i in range(end)]
        assert [position for _, position in context] == list(range(end)), "a page is not its own"
        tokens = [token for token, _ in context]
        prompt_logprobs = []
        if slot.wants_prompt_logprobs:
            prompt_logprobs = [
                TokenLogprobs([slot.prompt[i]], [float(fingerprint(tokens[:i]))], 1)
                for i in range(seq.start + 1, min(end + 1, len(slot.prompt)))
            ]
        if seq.samples and self.breaks_at.get(seq.request_id) == seq.output_index:
            slot.last_token = 0  # as argmax of NaN
            return SeqOutput([], [], [], error="logits are NaN")
        if not seq.samples:
            return SeqOutput([], [], prompt_logprobs)
        assert seq.output_index == end - len(slot.prompt)
        slot.last_token = next_token(tokens)
        logprobs = [TokenLogprobs([slot.last_token], [0.0], 1)]
        return SeqOutput([slot.last_token], logprobs, prompt_logprobs)


@dataclass
class Received:
    """What a client has got for one request."""

    token_ids: list[int] = field(default_factory=list)
    num_logprobs: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    last: SequenceUpdate | None = None


class Simulation:
    """Scheduler and device, joined as the engine joins them; checks every step."""

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        is_async: bool = False,
        breaks_at: Mapping[str, int] | None = None,
    ) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.device = SimulatedDevice(limits, breaks_at or {})
        self.depth = 2 if is_async else 1
        self.requests: dict[str, Request] = {}
        self.received: dict[str, Received] = {}
        self.aborted: set[str] = set()
        self.in_flight: deque[tuple[ScheduledStep, StepOutput]] = deque()

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)
            self.requests[request.request_id] = request
            self.received[request.request_id] = Received()

    def abort(self, request_id: str) -> None:
        ended = self.scheduler.abort([request_id])
        self.scheduler.check_integrity()
        self.aborted.update(request.request_id for request in ended)

    def dispatch(self) -> ScheduledStep | None:
        step = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self._check_progress(step)
        if step is not None:
            self.in_flight.append((step, self.device.run(step)))
        return step

    def settle(self) -> list[SequenceUpdate]:
        updates = self.scheduler.update(*self.in_flight.popleft())
        self.scheduler.check_integrity()
        for update in updates:
            self._receive(update)
        return updates

    def step(self) -> ScheduledStep | None:
        """What the engine's loop does in a round; leaves fewer than `depth` steps in flight."""
        while len(self.in_flight) >= self.depth:
            self.settle()
        step = self.dispatch()
        if self.in_flight and (step is None or len(self.in_flight) == self.depth):
            self.settle()
        return step

    def drain(self, max_steps: int = 5000) -> None:
        """Runs until all have ended, then checks every output and that everything is free."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished and not self.in_flight:
                break
            self.step()
        else:
            raise AssertionError("livelock: the requests do not end")
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
        for request_id in self.requests:
            self.check_output(request_id)

    def check_output(self, request_id: str) -> None:
        request, got = self.requests[request_id], self.received[request_id]
        expected = run_alone(request)
        assert got.token_ids == request.output_token_ids
        assert got.prompt_logprobs == expected.prompt_logprobs[: len(got.prompt_logprobs)]
        wants_logprobs = request.sampling.logprobs is not None
        assert got.num_logprobs == (len(got.token_ids) if wants_logprobs else 0)
        if request_id in self.aborted:
            assert request.finish_reason is FinishReason.ABORT
            assert got.token_ids == expected.token_ids[: len(got.token_ids)]
            return
        assert got.last is not None
        break_index = self.device.breaks_at.get(request_id)
        if break_index is not None and break_index < max(len(expected.token_ids), 1):
            assert (got.last.finish_reason, got.last.error) == ("error", "logits are NaN")
            assert got.token_ids == expected.token_ids[:break_index]
            return
        assert got.token_ids == expected.token_ids
        assert got.prompt_logprobs == expected.prompt_logprobs
        assert got.last.finish_reason == request.finish_reason == expected.finish_reason
        assert got.last.stop_reason == expected.stop_reason

    def _receive(self, update: SequenceUpdate) -> None:
        assert update.request_id not in self.aborted, "news of an aborted request"
        got = self.received[update.request_id]
        assert got.last is None or got.last.finish_reason is None, "news after the end"
        assert (update.queue_time_s is not None) == (got.last is None)
        got.last = update
        got.token_ids += update.new_token_ids
        got.num_logprobs += len(update.logprobs or [])
        got.prompt_logprobs += [entry.logprobs[0] for entry in update.prompt_logprobs or []]

    def _check_progress(self, step: ScheduledStep | None) -> None:
        """Nobody who could go on is passed over."""
        scheduled = {seq.request_id for seq in step.seqs} if step else set()
        running = [r for r in self.requests.values() if r.status is RequestStatus.RUNNING]
        if self.limits.policy == "priority":
            running.sort(key=lambda request: request.priority)
        idle = [
            request
            for request in running
            if request.request_id not in scheduled and not self._ends_in_flight(request)
        ]
        if running and not self._ends_in_flight(running[0]):
            assert running[0] not in idle, "the first in rank does not move"
        for request in idle:
            if request.num_tokens_with_pending - request.num_computed_tokens == 1:
                assert self.scheduler.stats().kv_usage == 1.0, "a decode starves"
        if step is None and self.scheduler.has_unfinished:
            assert self.in_flight, "nothing runs, nothing will"

    def _ends_in_flight(self, request: Request) -> bool:
        num_output = len(request.output_token_ids) + request.num_pending_tokens
        return request.num_pending_tokens > 0 and num_output >= request.max_tokens
