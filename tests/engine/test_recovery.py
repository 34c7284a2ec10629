"""A step that breaks: who broke it fails alone, all others get every token they should."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.messages import AbortRequests, SequenceUpdate, StepUpdate
from jaxinfer.core.progress import ignore_progress
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import ScheduledStep, StepOutput
from jaxinfer.engine import recovery
from jaxinfer.engine.build import build_core
from jaxinfer.scheduler.scheduler import Scheduler
from tests.engine.fake_runner import FakePendingStep, FakeRunner, _limits, expected_output
from tests.engine.test_core import add

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
BAD = 250  # a prompt that begins with it breaks the steps it is in
PLACES = ("dispatch", "result")


class DeviceError(RuntimeError):
    pass


@dataclass(frozen=True)
class Fault:
    """Whether a step breaks, and where the exception comes out."""

    is_in: Callable[[ScheduledStep, "BreakingRunner"], bool]
    place: str


class BreakingRunner(FakeRunner):
    """Loses its pages when it breaks, as a device does; only `reset` makes it work again."""

    def __init__(self, config: EngineConfig, fault: Fault) -> None:
        super().__init__(_limits(config))
        self.fault = fault
        self.is_lost = False
        self.num_resets = 0

    def dispatch(self, step: ScheduledStep) -> FakePendingStep:
        if self.is_lost:
            raise DeviceError("the arrays were donated")
        if self.fault.is_in(step, self):
            self.is_lost = True
            if self.fault.place == "dispatch":
                raise DeviceError("broken")
            self._rows.clear()
            return BrokenStep(output=StepOutput(step_id=step.step_id, seqs=[]), ready_time_s=0.0)
        return super().dispatch(step)

    def reset(self) -> None:
        super().reset()
        self.is_lost = False
        self.num_resets += 1

    def first_tokens(self, step: ScheduledStep) -> list[int]:
        """Of each sequence's prompt."""
        rows = (
            seq.admission.prompt_token_ids if seq.admission else self._tokens(seq.slot)
            for seq in step.seqs
        )
        return [row[0] for row in rows]

    def _tokens(self, slot: int) -> list[int]:
        return self._rows[slot].tokens


class BrokenStep(FakePendingStep):
    def result(self) -> StepOutput:
        raise DeviceError("broken")


def has_bad(step: ScheduledStep, runner: BreakingRunner) -> bool:
    return BAD in runner.first_tokens(step)


class Engine:
    def __init__(self, config: EngineConfig, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runner = BreakingRunner(config, fault)
        monkeypatch.setattr("tests.engine.fake_runner.build_runner", lambda *_: self.runner)
        self.updates: list[SequenceUpdate] = []
        self.built = build_core(
            config,
            runner_factory="tests.engine.fake_runner:build_runner",
            progress=ignore_progress,
            send=lambda _, message: self.updates.extend(
                message.sequences if isinstance(message, StepUpdate) else ()
            ),
            num_clients=1,
        )
        self.core = self.built.core

    def run(self) -> None:
        while self.core.has_work:
            self.step()

    def step(self) -> None:
        self.core.step()
        self.built.scheduler.check_integrity()

    def tokens(self, name: str) -> list[int]:
        return [t for u in self.updates if u.request_id == name for t in u.new_token_ids]

    def end(self, name: str) -> SequenceUpdate:
        [end] = [u for u in self.updates if u.request_id == name and u.finish_reason]
        return end


@pytest.fixture
def make(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    def engine(fault: Fault, **scheduler: int) -> Engine:
        own = replace(config, scheduler=replace(config.scheduler, **scheduler))
        return Engine(own, fault, monkeypatch)

    return engine


Make = Callable[..., Engine]


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("seed", range(4))
def test_the_culprits_fail_alone(make: Make, place: str, seed: int, is_async: bool) -> None:
    """Prompts of all lengths (some in chunks), more requests than slots, up to two culprits."""
    source = random.Random(seed)
    engine = make(Fault(has_bad, place), async_scheduling=is_async)
    prompts = {
        f"r{index}": [source.randrange(200) for _ in range(source.randrange(1, 45))]
        for index in range(14)
    }
    bad = source.sample(list(prompts), 1 + seed % 2)
    for name in bad:
        prompts[name][0] = BAD
    for name, prompt in prompts.items():
        engine.core.handle(0, add(name, prompt, GREEDY))
        if source.random() < 0.3:
            engine.step()
    engine.run()
    for name, prompt in prompts.items():
        if name in bad:
            end = engine.end(name)
            assert end.finish_reason == "error"
            assert name in (end.error or "")
            assert "DeviceError" in (end.error or "")
            assert engine.tokens(name) == []
        else:
            assert engine.tokens(name) == expected_output(prompt, GREEDY, 12)
    stats = engine.built.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
    assert engine.runner.num_resets <= len(bad) * 6


@pytest.mark.parametrize("place", PLACES)
def test_one_that_breaks_in_the_middle_keeps_what_it_had(make: Make, place: str) -> None:
    def at_fifth_token(step: ScheduledStep, runner: BreakingRunner) -> bool:
        return any(
            seq.output_index >= 5 and first == BAD
            for seq, first in zip(step.seqs, runner.first_tokens(step), strict=True)
        )

    engine = make(Fault(at_fifth_token, place))
    for name, first in (("a", 1), ("bad", BAD), ("b", 2)):
        engine.core.handle(0, add(name, [first, 7], GREEDY))
    engine.run()
    assert engine.tokens("bad") == expected_output([BAD, 7], GREEDY, 12)[:5]
    assert engine.end("bad").finish_reason == "error"
    for name, first in (("a", 1), ("b", 2)):
        assert engine.tokens(name) == expected_output([first, 7], GREEDY, 12)


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_that_does_not_come_again_costs_nobody(make: Make, place: str) -> None:
    def once(step: ScheduledStep, runner: BreakingRunner) -> bool:
        return step.step_id == 5 and runner.num_resets == 0

    engine = make(Fault(once, place))
    for index in range(5):
        engine.core.handle(0, add(f"r{index}", [index, 7], GREEDY))
    engine.run()
    for index in range(5):
        assert engine.tokens(f"r{index}") == expected_output([index, 7], GREEDY, 12)
    assert engine.runner.num_resets == 1


def test_no_page_of_before_is_found_again(make: Make) -> None:
    """The device's pages are empty after a reset: a prefix hit would read nothing."""

    def once(step: ScheduledStep, runner: BreakingRunner) -> bool:
        return BAD in runner.first_tokens(step) and runner.num_resets == 0

    prompt = list(range(30))
    engine = make(Fault(once, "result"))
    engine.core.handle(0, add("first", prompt, GREEDY))
    engine.run()
    engine.core.handle(0, add("bad", [BAD], GREEDY))
    engine.run()
    engine.core.handle(0, add("again", prompt, GREEDY))
    engine.run()
    assert engine.end("again").num_cached_tokens == 0
    assert engine.tokens("again") == engine.tokens("first")


def test_a_request_of_one_culprit_runs_while_others_come_and_go(make: Make) -> None:
    """Newcomers wait aside while blame is sought; aborts then work for whoever waits where."""
    engine = make(Fault(has_bad, "result"))
    for index in range(6):
        engine.core.handle(0, add(f"r{index}", [index, 7], GREEDY))
    engine.core.handle(0, add("bad", [BAD], GREEDY))
    while not engine.core._recovery.is_isolating:
        engine.step()
    engine.core.handle(0, add("late", [99], GREEDY))
    engine.core.handle(0, AbortRequests(request_ids=["r0", "r5"]))
    engine.built.scheduler.check_integrity()
    engine.run()
    assert engine.end("bad").finish_reason == "error"
    assert engine.tokens("late") == expected_output([99], GREEDY, 12)
    for index in range(1, 5):
        assert engine.tokens(f"r{index}") == expected_output([index, 7], GREEDY, 12)
    assert {engine.end(name).finish_reason for name in ("r0", "r5")} == {"abort"}


def test_all_suspects_leave(make: Make) -> None:
    engine = make(Fault(has_bad, "dispatch"))
    for name, first in (("a", 1), ("bad", BAD)):
        engine.core.handle(0, add(name, [first], GREEDY))
    engine.core.step()
    assert engine.core._recovery.is_isolating
    engine.core.handle(0, add("late", [9], GREEDY))
    engine.core.handle(0, AbortRequests(request_ids=["a", "bad"]))
    engine.run()
    assert engine.tokens("late") == expected_output([9], GREEDY, 12)


def test_a_scheduler_that_breaks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is in the step yet; the scheduler's own books may be half written."""
    engine = make(Fault(lambda *_: False, "dispatch"))
    decode = Scheduler._schedule_decode

    def breaks(scheduler: Scheduler, builder: object, state: object) -> bool:
        if state.request.prompt_token_ids[0] == BAD:  # pyright: ignore[reportAttributeAccessIssue]
            scheduler._kv._pool.take(1)  # a page is lost
            raise AssertionError("the books are wrong")
        return decode(scheduler, builder, state)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Scheduler, "_schedule_decode", breaks)
    for index in range(5):
        engine.core.handle(0, add(f"r{index}", [index, 7], GREEDY))
    engine.core.handle(0, add("bad", [BAD], GREEDY))
    engine.run()
    assert "AssertionError" in (engine.end("bad").error or "")
    for index in range(5):
        assert engine.tokens(f"r{index}") == expected_output([index, 7], GREEDY, 12)
    assert engine.built.scheduler.stats().kv_usage == 0


def test_a_device_that_never_works_again_ends_the_core(make: Make) -> None:
    engine = make(Fault(lambda *_: True, "dispatch"))
    for index in range(8):
        engine.core.handle(0, add(f"r{index}", [index], GREEDY))
    with pytest.raises(DeviceError):
        engine.run()
    failed = [u for u in engine.updates if u.finish_reason == "error"]
    assert len(failed) <= 4, "most are left to the next core's clients to try again"


def test_faults_that_go_on_and_on_end_the_core(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time something succeeds in between, and no request breaks when it is alone."""
    monkeypatch.setattr(recovery, "MAX_FAILURES", 6)
    engine = make(Fault(lambda step, _: len(step.seqs) > 1, "result"))
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for index in range(3):
        engine.core.handle(0, add(f"r{index}", [index], long))
    with pytest.raises(DeviceError):
        engine.run()
    assert not [u for u in engine.updates if u.finish_reason == "error"]


def test_the_log_has_the_cause(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    engine = make(Fault(has_bad, "result"))
    engine.core.handle(0, add("bad", [BAD], GREEDY))
    with caplog.at_level(logging.ERROR):
        engine.run()
    assert "request bad broke its step twice (DeviceError)" in caplog.text
    assert caplog.text.count("Traceback") == 2
