"""What the scheduler keeps about one request while it lives, and who holds a slot.

Knows no budget and no page counts.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from jaxinfer.core.request import Request, RequestStatus
from jaxinfer.kv_cache.manager import SequencePages
from jaxinfer.scheduler.queue import Rank
from jaxinfer.scheduler.stop import StopConditions, stop_conditions


def read_tokens(request: Request, start: int, stop: int) -> Sequence[int]:
    """Tokens [start, stop) of prompt + output, all known; copies no more than these."""
    num_prompt = len(request.prompt_token_ids)
    if start >= num_prompt:
        return request.output_token_ids[start - num_prompt : stop - num_prompt]
    if stop <= num_prompt:
        return request.prompt_token_ids[start:stop]
    return request.prompt_token_ids[start:] + request.output_token_ids[: stop - num_prompt]


@dataclass(kw_only=True, slots=True, eq=False)
class SequenceState:
    """A request and its place: queue, slot, pages."""

    request: Request
    rank: Rank
    stop: StopConditions
    pages: SequencePages
    slot: int | None = None
    num_prompt_logprobs: int = 0  # prompt positions, from 1 on, whose logprobs were passed on
    was_reported: bool = False  # an update of it went out

    @property
    def max_hit_tokens(self) -> int:
        """Most tokens that may come from the prefix cache.

        The last token is always computed: its logits are what a step is for. Prompt logprobs
        come from logits too, so the prompt is computed as far as they are still owed.
        """
        request = self.request
        wants_logprobs = request.sampling.prompt_logprobs is not None
        if wants_logprobs and self.num_prompt_logprobs < request.num_prompt_tokens - 1:
            return self.num_prompt_logprobs
        return request.num_tokens - 1

    def lose_place(self) -> None:
        """The device has lost it: no slot, no pages, nothing computed, nothing on its way."""
        request = self.request
        self.slot = None
        self.pages = SequencePages(read_tokens=self.pages.read_tokens, salt=self.pages.salt)
        if request.status is RequestStatus.RUNNING:
            request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = request.num_pending_tokens = 0


def make_state(request: Request, rank: Rank) -> SequenceState:
    return SequenceState(
        request=request,
        rank=rank,
        stop=stop_conditions(request),
        pages=SequencePages(read_tokens=partial(read_tokens, request), salt=request.cache_salt),
    )


class RunningSet:
    """The sequences that hold slots, in order of rank."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free_slots = list(reversed(range(num_slots)))
        self._states: list[SequenceState] = []

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._states)

    def __getitem__(self, index: int) -> SequenceState:
        return self._states[index]

    @property
    def is_full(self) -> bool:
        return not self._free_slots

    def add(self, state: SequenceState) -> None:
        state.slot = self._free_slots.pop()
        insort(self._states, state, key=attrgetter("rank"))

    def remove(self, state: SequenceState) -> None:
        assert state.slot is not None
        index = bisect_left(self._states, state.rank, key=attrgetter("rank"))
        assert self._states[index] is state
        del self._states[index]
        self._free_slots.append(state.slot)
        state.slot = None

    def check_integrity(self) -> None:
        """Asserts that every slot is free or held by one sequence, and that the order is right."""
        slots = self._free_slots + [-1 if s.slot is None else s.slot for s in self._states]
        assert sorted(slots) == list(range(self._num_slots)), "a slot is lost or held twice"
        ranks = [state.rank for state in self._states]
        assert ranks == sorted(ranks), "running sequences are out of order"
