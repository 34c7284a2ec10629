"""Two steps in flight, page shortage, aborts: what happens between schedule and update."""

import pytest

from jaxinfer.core.request import RequestStatus
from jaxinfer.core.step import PENDING_TOKEN
from tests.scheduler.simulated_device import Simulation, make_limits, make_request, run_alone


def test_the_next_step_continues_from_a_token_only_the_device_knows():
    sim = Simulation(make_limits(), is_async=True)
    sim.add(make_request("a", range(5), 3))
    first, second = sim.dispatch(), sim.dispatch()
    assert first is not None
    assert second is not None
    assert list(second.seqs[0].token_ids) == [PENDING_TOKEN]
    assert (second.seqs[0].start, second.seqs[0].output_index) == (5, 1)
    sim.settle()
    third = sim.dispatch()
    assert third is not None
    assert third.seqs[0].output_index == 2
    sim.settle()
    assert sim.dispatch() is None  # the step in flight yields the last of three tokens
    sim.settle()
    sim.drain()


def test_no_more_than_two_steps_are_in_flight():
    sim = Simulation(make_limits(), is_async=True)
    sim.add(make_request("a", [1], 9))
    sim.dispatch()
    sim.dispatch()
    with pytest.raises(AssertionError, match="is due"):
        sim.scheduler.schedule()


def test_a_stop_token_makes_the_share_of_the_next_step_void():
    first_token = run_alone(make_request("a", range(5), 1)).token_ids[0]
    sim = Simulation(make_limits(), is_async=True)
    sim.add(make_request("a", range(5), 9, stop_token_ids=[first_token]))
    sim.dispatch()
    sim.dispatch()
    assert [update.stop_reason for update in sim.settle()] == [first_token]
    assert not sim.scheduler.has_unfinished
    assert sim.scheduler.stats().kv_usage == 0
    sim.add(make_request("b", range(30, 40), 4))  # gets the slot and the pages at once
    sim.dispatch()
    assert sim.settle() == []  # the void share
    sim.drain()


def test_a_page_is_not_found_before_the_step_that_fills_it_has_ended():
    sim = Simulation(make_limits(), is_async=True)
    sim.add(make_request("a", range(8), 4))
    sim.dispatch()
    sim.add(make_request("b", [*range(8), 9], 4))
    step = sim.dispatch()
    assert step is not None
    assert [len(seq.token_ids) for seq in step.seqs] == [1, 9]
    sim.drain()


@pytest.mark.parametrize("is_async", [False, True])
def test_preemption_takes_the_last_and_resumes_it_first(is_async):
    sim = Simulation(make_limits(num_pages=8, max_num_seqs=3), is_async=is_async)
    sim.add(*(make_request(name, [i] * 6, 20) for i, name in enumerate("abcd")))
    finished = []
    while sim.scheduler.has_unfinished:
        sim.step()
        done = [r for r, got in sim.received.items() if got.last and got.last.finish_reason]
        finished += [r for r in done if r not in finished]
        assert sim.requests["a"].num_preemptions == 0
        if sim.requests["d"].status is RequestStatus.RUNNING:
            assert sim.requests["c"].status is not RequestStatus.PREEMPTED
    sim.drain()
    assert finished == ["a", "b", "c", "d"]
    assert sim.scheduler.stats().num_preemptions_total > 0


def test_preemption_takes_the_lowest_priority():
    sim = Simulation(make_limits(num_pages=8, policy="priority"))
    sim.add(make_request("low", [1] * 6, 20, priority=5))
    sim.step()
    sim.add(make_request("high", [2] * 6, 20, priority=1))
    sim.drain()
    assert sim.requests["high"].num_preemptions == 0
    assert sim.requests["low"].num_preemptions > 0


def test_a_preempted_request_finds_its_own_pages():
    sim = Simulation(make_limits(num_pages=8))
    sim.add(make_request("a", [1] * 4, 16), make_request("b", [2] * 12, 12))
    starts = []
    while sim.scheduler.has_unfinished:
        step = sim.step()
        if step is not None:
            starts += [seq.start for seq in step.seqs if seq.admission and seq.request_id == "b"]
    sim.drain()
    assert starts[0] == 0
    assert len(starts) > 1
    assert max(starts[1:]) >= 4
    last = sim.received["b"].last
    assert last is not None
    assert last.num_cached_tokens == 0  # of the first admission


def test_a_token_in_flight_survives_preemption():
    sim = Simulation(make_limits(num_pages=4, page_size=4, max_model_len=16), is_async=True)
    sim.add(make_request("a", [1] * 7, 8), make_request("b", [2] * 4, 8))
    preempted = sim.requests["b"]
    while preempted.status is not RequestStatus.PREEMPTED:
        sim.dispatch()
        if preempted.status is RequestStatus.PREEMPTED:
            break
        if len(sim.in_flight) == 2:
            sim.settle()
    num_known = len(preempted.output_token_ids)
    assert preempted.num_pending_tokens == 1
    while preempted.num_pending_tokens:
        sim.settle()
    assert len(preempted.output_token_ids) == num_known + 1
    sim.drain()


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("num_settled", [0, 1])
def test_abort_at_any_moment_frees_everything(num_steps, num_settled):
    sim = Simulation(make_limits(num_pages=8, max_num_seqs=2), is_async=True)
    sim.add(*(make_request(name, [i] * 6, 20) for i, name in enumerate("abc")))
    for _ in range(num_steps):
        sim.step()
    for _ in range(min(num_settled, len(sim.in_flight))):
        sim.settle()
    for request_id in ("b", "a", "c"):
        sim.abort(request_id)
    assert sim.scheduler.stats().kv_usage == 0
    assert not sim.scheduler.has_unfinished
    sim.add(make_request("next", [1] * 6, 20))
    sim.drain()


def test_an_id_may_be_used_again_while_the_aborted_one_is_in_flight():
    sim = Simulation(make_limits(), is_async=True)
    sim.add(make_request("a", [1, 2, 3], 5))
    sim.dispatch()
    sim.scheduler.abort(["a"])
    sim.add(make_request("a", [4, 5, 6], 5))
    sim.drain()


def test_aborting_twice_or_after_the_end_does_nothing():
    sim = Simulation(make_limits())
    sim.add(make_request("a", [1], 2), make_request("b", [1], 2))
    assert [request.request_id for request in sim.scheduler.abort(["a", "a"])] == ["a"]
    sim.abort("a")
    sim.aborted.add("a")
    sim.drain()
    assert sim.scheduler.abort(["b"]) == []


def test_newcomers_leave_a_page_for_each_running_sequence():
    sim = Simulation(make_limits(num_pages=5))
    sim.add(make_request("a", [1] * 8, 4), make_request("b", [2] * 9, 1))
    sim.step()
    assert sim.requests["b"].status is RequestStatus.WAITING  # its three pages are free, not four
    sim.drain()
    assert sim.scheduler.stats().num_preemptions_total == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_prompt_preempted_in_the_middle_goes_on_where_its_logprobs_ended(is_async):
    sim = Simulation(make_limits(num_pages=9, max_num_batched_tokens=4), is_async=is_async)
    sim.add(make_request("a", [1] * 7, 12))
    sim.step()
    request = make_request("b", range(24), 4, prompt_logprobs=0)
    sim.add(request)
    starts = []
    while sim.scheduler.has_unfinished:
        step = sim.step()
        starts += [seq.start for seq in step.seqs if seq.admission] if step else []
        if request.status is RequestStatus.PREEMPTED:
            assert request.output_token_ids == []
    sim.drain()
    assert request.num_preemptions == 1
    assert starts[0] == 0
    assert starts[1] >= 8


def test_prompt_logprobs_are_passed_on_once_and_not_computed_twice():
    sim = Simulation(make_limits(num_pages=8))
    sim.add(make_request("a", [1] * 4, 16), make_request("b", [2] * 12, 12, prompt_logprobs=0))
    starts = []
    while sim.scheduler.has_unfinished:
        step = sim.step()
        if step is not None:
            starts += [seq.start for seq in step.seqs if seq.admission and seq.request_id == "b"]
    sim.drain()  # checks that no position came twice
    assert starts[0] == 0
    assert max(starts[1:]) >= 4
