"""What a step holds: budget, chunks, order, admission, prefix hits, limits; update after each."""

import pytest

from jaxinfer.core.step import ScheduledStep, SeqOutput, StepOutput
from jaxinfer.errors import ConfigError, QueueFullError, RequestError
from jaxinfer.scheduler.scheduler import Scheduler
from tests.scheduler.simulated_device import (
    Simulation,
    make_limits,
    make_request,
    next_token,
    run_alone,
)


def shares(step: ScheduledStep | None) -> dict[str, int]:
    assert step is not None
    return {seq.request_id: len(seq.token_ids) for seq in step.seqs}


def test_a_prompt_is_computed_in_chunks_next_to_decodes():
    sim = Simulation(make_limits(max_num_batched_tokens=16))
    sim.add(make_request("a", range(5), 20))
    assert shares(sim.step()) == {"a": 5}
    sim.add(make_request("b", range(20, 60), 4))
    steps = [sim.step() for _ in range(4)]
    assert [shares(step) for step in steps] == [
        {"a": 1, "b": 15},
        {"a": 1, "b": 15},
        {"a": 1, "b": 10},
        {"a": 1, "b": 1},
    ]
    assert [seq.samples for step in steps if step for seq in step.seqs] == [
        *(True, False),
        *(True, False),
        *(True, True),
        *(True, True),
    ]
    sim.drain()


def test_one_token_sequences_come_first_whatever_they_are():
    sim = Simulation(make_limits(max_num_batched_tokens=8))
    sim.add(make_request("long", range(20)), make_request("one", [3]))
    sim.add(make_request("two", [3, 4]))
    first = sim.step()
    assert shares(first) == {"long": 8}
    assert shares(sim.step()) == {"long": 8}
    step = sim.step()
    assert step is not None
    assert [seq.request_id for seq in step.seqs] == ["one", "long", "two"]
    sim.drain()


def test_a_chunk_is_at_most_the_threshold():
    sim = Simulation(make_limits(long_prefill_token_threshold=6))
    sim.add(make_request("a", range(20)), make_request("b", range(30, 50)))
    assert shares(sim.step()) == {"a": 6, "b": 6}
    assert shares(sim.step()) == {"a": 6, "b": 6}
    sim.drain()


def test_all_decodes_run_however_long_the_prompt():
    sim = Simulation(make_limits(max_num_seqs=4, max_num_batched_tokens=4))
    sim.add(*(make_request(f"d{i}", [i], 12) for i in range(3)), make_request("p", range(40)))
    assert shares(sim.step()) == {"d0": 1, "d1": 1, "d2": 1, "p": 1}
    assert shares(sim.step()) == {"d0": 1, "d1": 1, "d2": 1, "p": 1}
    sim.drain()


def test_slots_bound_the_running_and_are_reused():
    sim = Simulation(make_limits(max_num_seqs=2))
    sim.add(*(make_request(f"r{i}", [i, 1], 1 + i) for i in range(4)))
    step = sim.step()
    assert shares(step) == {"r0": 2, "r1": 2}
    assert (sim.scheduler.stats().num_running, sim.scheduler.stats().num_waiting) == (1, 2)
    step = sim.step()
    assert shares(step) == {"r1": 1, "r2": 2}
    assert step is not None
    assert step.seqs[1].slot == 0
    sim.drain()


def test_admission_and_page_table_growth():
    sim = Simulation(make_limits(page_size=4))
    sim.add(make_request("a", range(7), 4))
    steps = [sim.step() for _ in range(4)]
    seqs = [step.seqs[0] for step in steps if step]
    assert [(s.start, s.first_new_page, len(s.new_pages), s.output_index) for s in seqs] == [
        (0, 0, 2, 0),
        (7, 2, 0, 1),
        (8, 2, 1, 2),
        (9, 3, 0, 3),
    ]
    assert [s.admission is not None for s in seqs] == [True, False, False, False]
    assert seqs[0].admission is not None
    assert list(seqs[0].admission.prompt_token_ids) == list(range(7))
    sim.drain()


def test_a_prefix_is_computed_once():
    sim = Simulation(make_limits())
    sim.add(make_request("a", range(10)))
    sim.step()
    sim.add(make_request("b", range(10)), make_request("other", range(10), cache_salt="x"))
    step = sim.step()
    assert shares(step) == {"a": 1, "b": 2, "other": 10}
    sim.drain()
    for request_id, num_cached in (("a", 0), ("b", 8), ("other", 0)):
        last = sim.received[request_id].last
        assert last is not None
        assert last.num_cached_tokens == num_cached
    stats = sim.scheduler.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (30, 8)


def test_outputs_are_a_prefix_of_the_next_turn():
    sim = Simulation(make_limits())
    sim.add(make_request("a", range(6), 8))
    sim.drain()
    history = [*range(6), *sim.received["a"].token_ids]
    sim.add(make_request("b", [*history, 1, 2]))
    assert shares(sim.step()) == {"b": 4}  # 13 of 14 are computed: three full pages
    sim.drain()


def test_reset_prefix_cache():
    sim = Simulation(make_limits())
    sim.add(make_request("a", range(10)))
    sim.drain()
    sim.scheduler.reset_prefix_cache()
    sim.add(make_request("b", range(10)))
    assert shares(sim.step()) == {"b": 10}
    sim.drain()


def test_prompt_logprobs_compute_the_whole_prompt_but_share_it():
    sim = Simulation(make_limits(max_num_batched_tokens=6))
    sim.add(make_request("a", range(10), prompt_logprobs=2))
    sim.drain()
    sim.add(make_request("b", range(10), prompt_logprobs=0, logprobs=1))
    assert shares(sim.step()) == {"b": 6}
    sim.drain()
    sim.add(make_request("c", range(10)))
    assert shares(sim.step()) == {"c": 2}
    sim.drain()
    assert len(sim.received["b"].prompt_logprobs) == 9
    assert sim.scheduler.stats().prefix_queries_total == 10


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_no_token_is_wanted(prompt_logprobs):
    sim = Simulation(make_limits(), is_async=True)
    sim.add(make_request("a", range(20), 0, prompt_logprobs=prompt_logprobs))
    sim.drain()
    last = sim.received["a"].last
    assert last is not None
    assert (last.new_token_ids, last.finish_reason) == ([], "length")
    assert sim.scheduler.stats().num_steps_total == 2


def test_a_broken_sequence_fails_alone_and_its_pages_are_not_found():
    sim = Simulation(make_limits(), breaks_at={"a": 1})
    sim.add(make_request("a", range(10)), make_request("b", range(20, 24)))
    sim.drain()
    assert sim.received["a"].token_ids == run_alone(sim.requests["a"]).token_ids[:1]
    sim.add(make_request("c", range(10)))
    assert shares(sim.step()) == {"c": 10}
    sim.drain()


def test_priority_decides_who_is_admitted():
    sim = Simulation(make_limits(policy="priority", max_num_seqs=1))
    sim.add(make_request("low", [1], 1, priority=9))
    sim.add(make_request("a", [1], 1), make_request("b", [1], 1))
    sim.add(make_request("high", [1], 1, priority=-1))
    order = []
    while sim.scheduler.has_unfinished:
        order += shares(sim.step())
    assert order == ["high", "a", "b", "low"]


def test_the_queue_is_bounded():
    scheduler = Scheduler(make_limits(max_num_queued=2))
    scheduler.add(make_request("a", [1]))
    scheduler.add(make_request("b", [1]))
    with pytest.raises(QueueFullError, match=r"2 requests are waiting, the limit is 2"):
        scheduler.add(make_request("c", [1]))
    assert scheduler.abort(["a", "unknown"])[0].request_id == "a"
    scheduler.add(make_request("c", [1]))
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "message"),
    [
        ([], 1, "prompt", "empty"),
        (range(60), 5, "max_tokens", r"60 tokens and max_tokens is 5.*context of 64"),
        (range(20), 22, "max_tokens", r"KV cache holds 40 tokens \(10 pages of 4\)"),
        (range(41), 0, "max_tokens", "KV cache holds 40"),
    ],
)
def test_requests_that_can_never_run_are_refused(prompt, max_tokens, param, message):
    scheduler = Scheduler(make_limits(num_pages=10))
    with pytest.raises(RequestError, match=message) as error:
        scheduler.add(make_request("a", prompt, max_tokens))
    assert error.value.param == param
    assert not scheduler.has_unfinished


def test_a_request_may_fill_the_whole_cache_and_the_whole_context():
    sim = Simulation(make_limits(num_pages=10, max_model_len=41))
    sim.add(make_request("a", range(20), 21), make_request("b", range(40), 1))
    sim.drain()
    assert len(sim.received["a"].token_ids) == 21


def test_request_ids_are_unique_among_the_living():
    sim = Simulation(make_limits())
    sim.add(make_request("a", [1], 1))
    with pytest.raises(RequestError, match="'a' is in use"):
        sim.scheduler.add(make_request("a", [2]))
    sim.drain()
    sim.add(make_request("a", [2]))
    sim.drain()


def test_queue_time_is_reported_once():
    now = [100.0]
    scheduler = Scheduler(make_limits(), clock=lambda: now[0])
    request = make_request("a", [1, 2], 2)
    request.arrival_time_s = 98.5
    scheduler.add(request)
    times = []
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        assert step is not None
        now[0] += 1.0
        result = SeqOutput([next_token([1])], [], [])
        (update,) = scheduler.update(step, StepOutput(step_id=step.step_id, seqs=[result]))
        times.append(update.queue_time_s)
    assert times == [1.5, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 17}, r"--max-num-batched-tokens=16 must not be below --max-num-seqs=17"),
        ({"num_pages": 0}, "--num-gpu-blocks-override must be at least 1, got 0"),
        ({"max_num_queued": 0}, "--max-num-queued-reqs must be at least 1"),
        ({"policy": "lifo"}, "fcfs or priority, got 'lifo'"),
    ],
)
def test_limits_that_cannot_serve_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_limits(**changes)
