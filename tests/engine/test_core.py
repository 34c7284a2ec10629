"""EngineCore alone: what it has in flight, whom it answers, what it refuses."""

import queue
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import pytest

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.messages import (
    AbortRequests,
    AddRequest,
    CoreMessage,
    Rejected,
    ResetPrefixCache,
    Shutdown,
    StepUpdate,
)
from jaxinfer.core.progress import ignore_progress
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import ScheduledStep
from jaxinfer.engine.build import BuiltCore, build_core
from jaxinfer.engine.transport import Incoming
from tests.engine.fake_runner import FakePendingStep, FakeRunner, expected_output

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


class Sent(NamedTuple):
    client_index: int
    message: CoreMessage


class Engine:
    """A core for two clients, stepped by hand, checked after every step."""

    def __init__(self, config: EngineConfig) -> None:
        self.sent: list[Sent] = []
        self.built: BuiltCore = build_core(
            config,
            runner_factory="tests.engine.fake_runner:build_runner",
            progress=ignore_progress,
            send=lambda index, message: self.sent.append(Sent(index, message)),
            num_clients=2,
        )
        self.core = self.built.core

    def run(self) -> None:
        while self.core.has_work:
            self.core.step()
            self.built.scheduler.check_integrity()

    def tokens(self, client_index: int, request_id: str) -> list[int]:
        return [
            token
            for index, message in self.sent
            if index == client_index and isinstance(message, StepUpdate)
            for update in message.sequences
            if update.request_id == request_id
            for token in update.new_token_ids
        ]

    def rejections(self) -> list[tuple[int, str, str, str | None]]:
        return [
            (index, message.request_id, message.kind, message.param)
            for index, message in self.sent
            if isinstance(message, Rejected)
        ]


def add(request_id: str, prompt: list[int], params: SamplingParams = GREEDY) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=params, arrival_time_s=0.0
    )


@pytest.fixture
def engine(config: EngineConfig) -> Engine:
    return Engine(config)


@pytest.mark.parametrize(("async_scheduling", "depth"), [(True, 2), (False, 1)])
def test_the_next_step_is_dispatched_before_the_result_is_read(
    config: EngineConfig,
    monkeypatch: pytest.MonkeyPatch,
    async_scheduling: bool,
    depth: int,
) -> None:
    in_flight = 0
    seen: list[int] = []
    dispatch, result = FakeRunner.dispatch, FakePendingStep.result

    def counting_dispatch(runner: FakeRunner, step: ScheduledStep) -> FakePendingStep:
        nonlocal in_flight
        in_flight += 1
        seen.append(in_flight)
        return dispatch(runner, step)

    def counting_result(pending: FakePendingStep) -> object:
        nonlocal in_flight
        in_flight -= 1
        return result(pending)

    monkeypatch.setattr(FakeRunner, "dispatch", counting_dispatch)
    monkeypatch.setattr(FakePendingStep, "result", counting_result)
    scheduler = replace(config.scheduler, async_scheduling=async_scheduling)
    engine = Engine(replace(config, scheduler=scheduler))
    engine.core.handle(0, add("a", [1, 2, 3]))
    engine.run()
    assert engine.tokens(0, "a") == expected_output([1, 2, 3], GREEDY, 10)
    assert seen[1:-1] == [depth] * (len(seen) - 2)


def test_each_client_hears_of_its_own_requests_only(engine: Engine) -> None:
    engine.core.handle(0, add("a", [1, 2]))
    engine.core.handle(1, add("b", [3, 4]))
    engine.core.handle(1, AbortRequests(request_ids=["a"]))  # not its own: ignored
    engine.run()
    assert engine.tokens(0, "a") == expected_output([1, 2], GREEDY, 10)
    assert engine.tokens(1, "b") == expected_output([3, 4], GREEDY, 10)
    assert engine.tokens(0, "b") == engine.tokens(1, "a") == []


def test_an_id_in_use_is_refused_and_free_again_afterwards(engine: Engine) -> None:
    engine.core.handle(0, add("a", [1, 2]))
    engine.core.handle(1, add("a", [1, 2]))
    assert engine.rejections() == [(1, "a", "invalid", "request_id")]
    engine.run()
    engine.core.handle(1, add("a", [1, 2]))
    engine.run()
    assert engine.tokens(1, "a") == expected_output([1, 2], GREEDY, 10)


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], GREEDY, "prompt"),
        ([1] * 64, GREEDY, "prompt"),
        ([1] * 65, SamplingParams(max_tokens=0), "prompt"),
        ([259], GREEDY, "prompt"),
        ([-1], GREEDY, "prompt"),
        ([1], SamplingParams(n=2), "n"),
        ([1], SamplingParams(stop_token_ids=[259]), "stop_token_ids"),
        ([1], SamplingParams(allowed_token_ids=[300]), "allowed_token_ids"),
    ],
)
def test_a_core_trusts_no_client(
    engine: Engine, prompt: list[int], params: SamplingParams, param: str
) -> None:
    engine.core.handle(0, add("a", prompt, params))
    assert engine.rejections() == [(0, "a", "invalid", param)]
    assert not engine.core.has_work


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_priority_needs_the_policy(config: EngineConfig, policy: Any) -> None:
    scheduler = replace(config.scheduler, scheduling_policy=policy)
    engine = Engine(replace(config, scheduler=scheduler))
    engine.core.handle(0, msgspec.structs.replace(add("a", [1]), priority=-1))
    is_refused = engine.rejections() == [(0, "a", "invalid", "priority")]
    assert is_refused == (policy == "fcfs")


def test_max_tokens_is_cut_to_the_context(engine: Engine) -> None:
    for request_id, max_tokens in (("none", None), ("much", 1000)):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        engine.core.handle(0, add(request_id, [1] * 60, params))
    engine.run()
    assert len(engine.tokens(0, "none")) == len(engine.tokens(0, "much")) == 4


def test_max_tokens_none_is_cut_to_the_cache(config: EngineConfig) -> None:
    engine = Engine(replace(config, cache=replace(config.cache, num_gpu_blocks_override=4)))
    unbounded = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    engine.core.handle(0, add("a", [1] * 20, unbounded))
    engine.run()
    assert engine.rejections() == []
    assert len(engine.tokens(0, "a")) == 4 * 8 - 20 + 1


def test_a_full_queue_is_told(config: EngineConfig) -> None:
    config = replace(config, scheduler=replace(config.scheduler, max_num_queued_reqs=2))
    engine = Engine(config)
    for index in range(3):
        engine.core.handle(0, add(str(index), [1]))
    assert engine.rejections() == [(0, "2", "queue_full", None)]
    engine.run()
    engine.core.handle(0, add("2", [1]))
    engine.run()
    assert engine.tokens(0, "2") == expected_output([1], GREEDY, 10)


def test_an_abort_frees_at_once_and_its_figures_are_sent(engine: Engine) -> None:
    engine.core.handle(0, add("a", [1, 2]))
    for _ in range(3):
        engine.core.step()
    engine.core.handle(0, AbortRequests(request_ids=["a", "unknown"]))
    last = engine.sent[-2].message
    assert isinstance(last, StepUpdate)
    assert (last.stats.num_running, last.stats.kv_usage) == (0, 0.0)
    assert [update.finish_reason for update in last.sequences] == ["abort"]
    engine.run()
    assert not engine.core.has_work


def test_serve_sleeps_when_idle_and_ends_at_shutdown(engine: Engine) -> None:
    inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
    inbox.put(Incoming(0, ResetPrefixCache()))
    inbox.put(Incoming(0, add("a", [1, 2])))
    waits: list[bool] = []

    class Inbox:
        """Shuts down when the core would sleep for the second time."""

        def get(self, *, block: bool) -> Incoming:
            waits.append(block)
            if block and len(engine.tokens(0, "a")) == 10:
                return Incoming(0, Shutdown())
            return inbox.get(block=block)

    engine.core.serve(Inbox())  # pyright: ignore[reportArgumentType]
    # It waits before there is a request and after it ended, and never in between.
    assert waits[:2] == [True, True]
    assert waits[-1]
    assert not any(waits[2:-1])


def test_updates_say_how_much_their_step_computed(config: EngineConfig) -> None:
    engine = Engine(config)
    prompt = list(range(40))  # more than one step holds
    engine.core.handle(
        0, AddRequest(request_id="a", prompt_token_ids=prompt, sampling=GREEDY, arrival_time_s=0.0)
    )
    engine.core.handle(0, AbortRequests(request_ids=["unknown"]))
    engine.run()
    numbers = [m.num_tokens for i, m in engine.sent if i == 0 and isinstance(m, StepUpdate)]
    assert numbers[0] == 0, "an update without a step"
    assert numbers[1:] == [32, 8] + [1] * 9
