"""Collects the sequences of one step and keeps its token budget. Decides nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.core.step import PENDING_TOKEN, Admission, ScheduledSeq, ScheduledStep
from jaxinfer.scheduler.sequence import SequenceState, read_tokens

_PENDING_ONLY = (PENDING_TOKEN,)


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlightStep:
    """A step whose results are still to come."""

    step: ScheduledStep
    states: Sequence[SequenceState]  # parallel to step.seqs


class StepBuilder:
    """Adding a sequence moves its progress on: it is counted as computed from then on."""

    def __init__(self, *, step_id: int, num_budget_tokens: int) -> None:
        self.num_tokens_left = num_budget_tokens
        self._num_budget_tokens = num_budget_tokens
        self._step_id = step_id
        # Sequences with one token, then the others. Pairs of lists: this runs for every sequence
        # in every step.
        self._singles: list[ScheduledSeq] = []
        self._single_states: list[SequenceState] = []
        self._chunks: list[ScheduledSeq] = []
        self._chunk_states: list[SequenceState] = []

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
        slot = state.slot
        assert slot is not None
        assert 0 < num_tokens <= self.num_tokens_left, "the step's token budget is exceeded"
        start = request.num_computed_tokens
        stop = start + num_tokens
        num_pending = request.num_pending_tokens
        num_output = len(request.output_token_ids) + num_pending
        samples = stop == len(request.prompt_token_ids) + num_output
        scheduled = ScheduledSeq(
            request_id=request.request_id,
            slot=slot,
            start=start,
            # With a token pending, all known ones are computed: it is the one that is left.
            token_ids=_PENDING_ONLY if num_pending else read_tokens(request, start, stop),
            samples=samples,
            output_index=num_output,
            first_new_page=len(state.pages.pages) - len(new_pages),
            new_pages=new_pages,
            admission=admission,
        )
        request.num_computed_tokens = stop
        if samples:
            request.num_pending_tokens = num_pending + 1
        self.num_tokens_left -= num_tokens
        if num_tokens == 1:
            self._singles.append(scheduled)
            self._single_states.append(state)
        else:
            self._chunks.append(scheduled)
            self._chunk_states.append(state)

    def build(self) -> InFlightStep | None:
        """The step, or None if nothing was added."""
        seqs = self._singles + self._chunks
        if not seqs:
            return None
        step = ScheduledStep(
            step_id=self._step_id,
            seqs=seqs,
            num_tokens=self._num_budget_tokens - self.num_tokens_left,
        )
        return InFlightStep(step=step, states=self._single_states + self._chunk_states)
