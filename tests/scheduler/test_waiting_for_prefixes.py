"""Newcomers whose prompt others are computing wait for it instead of computing it again."""

import pytest

from jaxinfer.core.step import ScheduledStep
from tests.scheduler.simulated_device import Simulation, make_limits, make_request

PROMPT = range(100, 124)  # six pages of four; at most five can be shared


def simulate(*, is_async: bool = False, **limits: int) -> Simulation:
    numbers = {"max_num_batched_tokens": 64, "num_pages": 64, "min_tokens_to_wait_for": 16}
    return Simulation(make_limits(**{**numbers, **limits}), is_async=is_async)


def shares(step: ScheduledStep | None) -> dict[str, int]:
    return {} if step is None else {seq.request_id: len(seq.token_ids) for seq in step.seqs}


def num_computed(sim: Simulation) -> int:
    """Runs to the end; the tokens of all steps but the last tokens of outputs."""
    total = 0
    while sim.scheduler.has_unfinished:
        total += sum(shares(sim.step()).values())
    sim.drain()
    return total


@pytest.mark.parametrize("is_async", [False, True])
def test_equal_prompts_are_computed_once(is_async: bool) -> None:
    sim = simulate(is_async=is_async)
    sim.add(*(make_request(f"r{i}", PROMPT, 1) for i in range(4)))
    assert num_computed(sim) == 24 + 3 * 4
    assert sim.scheduler.stats().prefix_hits_total == 3 * 20


def test_the_first_is_not_held_up_and_the_others_follow_it() -> None:
    sim = simulate()
    sim.add(*(make_request(f"r{i}", PROMPT, 3) for i in range(3)))
    assert shares(sim.step()) == {"r0": 24}
    assert shares(sim.step()) == {"r0": 1, "r1": 4, "r2": 4}
    sim.drain()


def test_others_overtake_and_lose_nothing() -> None:
    sim = simulate()
    sim.add(make_request("a", PROMPT, 3), make_request("b", PROMPT, 3))
    sim.add(make_request("c", range(20), 3))
    assert shares(sim.step()) == {"a": 24, "c": 20}
    assert set(shares(sim.step())) == {"a", "c", "b"}
    sim.drain()


def test_a_little_is_not_worth_a_wait() -> None:
    sim = simulate(min_tokens_to_wait_for=24)
    sim.add(make_request("a", PROMPT), make_request("b", PROMPT))
    assert shares(sim.step()) == {"a": 24, "b": 24}
    sim.drain()


def test_only_what_is_missing_counts() -> None:
    """Pages that are there already are no reason to wait: few more tokens would be gained."""
    sim = simulate()
    sim.add(make_request("old", [*PROMPT][:13], 1))
    sim.drain()
    sim.add(make_request("a", PROMPT), make_request("b", PROMPT))
    assert shares(sim.step()) == {"a": 12, "b": 12}
    sim.drain()


def test_what_is_there_and_what_is_coming_are_told_apart() -> None:
    sim = simulate()
    sim.add(make_request("old", [*PROMPT][:5], 1))
    sim.drain()
    sim.add(make_request("a", PROMPT), make_request("b", PROMPT))
    assert shares(sim.step()) == {"a": 20}
    sim.drain()


@pytest.mark.parametrize("salts", [("x", "y"), (None, "")])
def test_salts_do_not_wait_for_each_other(salts: tuple[str | None, str | None]) -> None:
    sim = simulate()
    sim.add(*(make_request(f"r{i}", PROMPT, 3, cache_salt=s) for i, s in enumerate(salts)))
    assert shares(sim.step()) == {"r0": 24, "r1": 24}
    sim.drain()


def test_a_promise_ends_with_its_promiser() -> None:
    """The one that was waited for is aborted in the middle of its prompt."""
    sim = simulate(max_num_batched_tokens=8)
    sim.add(make_request("a", PROMPT, 2), make_request("b", PROMPT, 2))
    assert shares(sim.step()) == {"a": 8}
    sim.abort("a")
    assert shares(sim.step()) == {"b": 8}  # (it finds what a has published, and goes on from there)
    sim.drain()


def test_a_reset_cache_promises_nothing() -> None:
    sim = simulate(max_num_batched_tokens=8)
    sim.add(make_request("a", PROMPT, 2), make_request("b", PROMPT, 2))
    assert shares(sim.step()) == {"a": 8}
    sim.scheduler.reset_prefix_cache()
    steps = [shares(sim.step()) for _ in range(2)]
    assert steps == [{"a": 8}, {"a": 8}]
    assert shares(sim.step()) == {"a": 1, "b": 7}
    sim.drain()


def test_without_a_cache_nobody_waits() -> None:
    sim = simulate(enable_prefix_caching=False)
    sim.add(make_request("a", PROMPT), make_request("b", PROMPT))
    assert shares(sim.step()) == {"a": 24, "b": 24}
    sim.drain()
