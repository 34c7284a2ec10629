"""Collects the sequences of one step and keeps its token budget. Decides nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.core.request import Request
from jaxinfer.core.step import PENDING_TOKEN, Admission, ScheduledSeq, ScheduledStep
from jaxinfer.scheduler.sequence import SequenceState, read_tokens

_PENDING_ONLY = (PENDING_TOKEN,)


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlightStep:
    """A step whose results are still to come."""

    step: ScheduledStep
    states: Sequence[SequenceState]  # parallel to step.seqs


def _tokens_to_compute(request: Request, start: int, stop: int) -> Sequence[int]:
    if request.num_pending_tokens == 0:
        return read_tokens(request, start, stop)
    # Its last known token was in the step that samples the pending one, so that one is left.
    assert (start, stop) == (request.num_tokens, request.num_tokens + 1)
    return _PENDING_ONLY


class StepBuilder:
    """Adding a sequence moves its progress on: it is counted as computed from then on."""

    def __init__(self, *, step_id: int, num_budget_tokens: int) -> None:
        self.num_tokens_left = num_budget_tokens
        self._num_budget_tokens = num_budget_tokens
        self._step_id = step_id
        self._singles: list[tuple[ScheduledSeq, SequenceState]] = []
        self._chunks: list[tuple[ScheduledSeq, SequenceState]] = []

    def add(
        self,
        state: SequenceState,
        *,
        num_tokens: int,
        new_pages: Sequence[int] = (),
        admission: Admission | None = None,
    ) -> None:
        """Takes the next `num_tokens` tokens of a running sequence, whose page table already ends
        with `new_pages`."""
        request = state.request
        assert state.slot is not None
        assert 0 < num_tokens <= self.num_tokens_left, "the step's token budget is exceeded"
        start = request.num_computed_tokens
        stop = start + num_tokens
        samples = stop == request.num_tokens_with_pending
        scheduled = ScheduledSeq(
            request_id=request.request_id,
            slot=state.slot,
            start=start,
            token_ids=_tokens_to_compute(request, start, stop),
            samples=samples,
            output_index=len(request.output_token_ids) + request.num_pending_tokens,
            first_new_page=len(state.pages.pages) - len(new_pages),
            new_pages=new_pages,
            admission=admission,
        )
        request.num_computed_tokens = stop
        if samples:
            request.num_pending_tokens += 1
        self.num_tokens_left -= num_tokens
        (self._singles if num_tokens == 1 else self._chunks).append((scheduled, state))

    def build(self) -> InFlightStep | None:
        """The step, or None if nothing was added."""
        entries = self._singles + self._chunks
        if not entries:
            return None
        step = ScheduledStep(
            step_id=self._step_id,
            seqs=[seq for seq, _ in entries],
            num_tokens=self._num_budget_tokens - self.num_tokens_left,
        )
        return InFlightStep(step=step, states=[state for _, state in entries])
