"""What the core does when a step breaks: starts the device afresh, and finds who breaks it.

A step is a batch, and an exception does not say whose fault it is. The pages are lost either way
(they were donated to the step), so all requests are computed anew, which the scheduler can do at
any time. The requests of the broken step are suspects. They run in ever smaller groups, everyone
else waiting, until each has got past the point where the step broke, or a step with a single
request breaks: that request fails, alone. (Adaptive group testing by halving: Hwang, "A method for
detecting all defective members in a population by group testing", JASA 67, 1972.)

Knows the scheduler and that a runner can be reset; must not know messages' receivers, devices or
what a request asks for.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

from jaxinfer.core.messages import SequenceUpdate
from jaxinfer.core.step import ScheduledStep
from jaxinfer.logging import get_logger
from jaxinfer.scheduler.scheduler import Scheduler

logger = get_logger(__name__)

MAX_FAILURES = 64
"""Failed steps within `WINDOW_S`; one more ends the core. Finding a culprit among N costs about
2 + log2(N), so this is several of them."""
WINDOW_S = 600.0
_SPARE_FAILURES = 4


class StepFailedError(Exception):
    """A step could not be scheduled, dispatched or finished; `__cause__` says why.

    `steps` are those in which the fault may lie; none when it broke before it was known who would
    be in it.
    """

    def __init__(self, steps: Sequence[ScheduledStep]) -> None:
        super().__init__("a step failed")
        self.steps = steps


class Recovery:
    """Goes with one scheduler. The core asks `is_isolating` and tells what its steps did."""

    def __init__(
        self,
        scheduler: Scheduler,
        reset_runner: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._reset_runner = reset_runner
        self._clock = clock
        self._failure_times_s: deque[float] = deque(maxlen=MAX_FAILURES)
        self._num_barren = 0  # failures since the last step that succeeded
        self._most_barren = 0
        self._goals: dict[str, int] = {}  # suspects, and the token that they must get past
        self._group: set[str] = set()  # who runs now: suspects, and those just cleared
        self._groups: list[set[str]] = []  # suspects to run after them; the next one last
        self.num_failures = 0

    @property
    def is_isolating(self) -> bool:
        """Suspects are being run apart: one step at a time, so that blame is certain."""
        return bool(self._group)

    def prepare(self) -> None:
        """Before a step, while isolating: goes on to the next group when this one is through."""
        unfinished = self._scheduler.unfinished
        for name in self._goals.keys() - unfinished.keys():
            del self._goals[name]
        if not self._group & self._goals.keys():
            self._next_group()

    def succeeded(self, step: ScheduledStep) -> None:
        """A step has ended well: who got past the point of failure is no suspect any more.

        Past it by a token: what broke as a decode is computed again as a part of a prompt first,
        which may be another program.
        """
        self._num_barren = 0
        if self._goals:
            for seq in step.seqs:
                if seq.start + len(seq.token_ids) > self._goals.get(seq.request_id, 0):
                    self._goals.pop(seq.request_id, None)

    def failed(self, failure: StepFailedError) -> SequenceUpdate | None:
        """Makes all requests wait for a fresh start; the news of the one that is to blame, if any.

        No step is in flight afterwards. Raises the cause when this has happened too often, and
        whatever the runner raises that cannot be reset.
        """
        cause = failure.__cause__
        assert isinstance(cause, Exception)
        suspects = self._suspects(failure.steps)
        self._count(cause, suspects)
        logger.error("a step with %d requests failed", len(suspects), exc_info=cause)
        self._scheduler.restart()
        self._reset_runner()
        if len(suspects) == 1 and suspects.keys() <= self._goals.keys():
            [name] = suspects
            return self._blame(name, cause)
        self._isolate(suspects)
        return None

    def _suspects(self, steps: Sequence[ScheduledStep]) -> dict[str, int]:
        """The requests of the steps, with the tokens that were to be computed of them."""
        requests = self._scheduler.unfinished
        if not steps:
            names = self._group & requests.keys() if self.is_isolating else requests.keys()
            return {name: requests[name].num_tokens_with_pending for name in names}
        ends: dict[str, int] = {}
        for seq in (seq for step in steps for seq in step.seqs):
            if seq.request_id in requests:
                end = seq.start + len(seq.token_ids)
                ends[seq.request_id] = max(end, ends.get(seq.request_id, 0))
        return ends

    def _count(self, cause: Exception, suspects: dict[str, int]) -> None:
        """Raises `cause` when nothing but failures comes, fast or slowly."""
        now_s = self._clock()
        times_s = self._failure_times_s
        is_often = len(times_s) == MAX_FAILURES and now_s - times_s[0] < WINDOW_S
        if self._num_barren == 0:
            self._most_barren = len(suspects).bit_length() + _SPARE_FAILURES
        times_s.append(now_s)
        self.num_failures += 1
        self._num_barren += 1
        if is_often or self._num_barren > self._most_barren:
            logger.error("too many steps failed (%d): the core ends", self.num_failures)
            raise cause

    def _isolate(self, suspects: dict[str, int]) -> None:
        """Splits those that are still suspected; others of their group are to be run, too."""
        blamable = {name: end for name, end in suspects.items() if name in self._goals}
        if not blamable:  # a new failure: nothing is known of any of them
            blamable = suspects
        rest = (self._group & self._goals.keys()) - blamable.keys()
        self._goals |= blamable
        names = sorted(blamable)
        half = len(names) // 2  # (of one: nothing and itself, which then runs alone)
        self._groups += [part for part in (rest, set(names[half:]), set(names[:half])) if part]
        self._next_group()

    def _blame(self, name: str, cause: Exception) -> SequenceUpdate:
        """Ends the request that broke a step when it was alone in it, for the second time."""
        user_id = name.rpartition("/")[0] or name  # (fan_out.py makes ids of sequences)
        kind = type(cause).__name__
        logger.error("request %s broke its step twice (%s): it fails, alone", user_id, kind)
        self._goals.pop(name, None)
        update = self._scheduler.fail(
            name, f"the engine broke twice while it computed request {user_id} ({kind})"
        )
        self._groups.append(self._group & self._goals.keys())
        self._next_group()
        return update

    def _next_group(self) -> None:
        self._group = set()
        while self._groups and not self._group:
            self._group = self._groups.pop() & self._goals.keys()
        if self._group:
            self._scheduler.run_only(self._group)
        else:
            self._goals.clear()
            self._scheduler.run_all()
