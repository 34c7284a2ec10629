"""When requests are sent."""

import asyncio
import math

import numpy as np
import pytest

from jaxinfer.bench.client import Prompt, Target
from jaxinfer.bench.load import LoadResult, LoadShape, arrival_times, run_load
from jaxinfer.errors import ConfigError
from tests.bench.openai_server import KnownServer, running


def run(server: KnownServer, shape: LoadShape, *, num_prompts: int, **options) -> LoadResult:
    async def main() -> LoadResult:
        async with running(server):
            target = Target(base_url=server.url, endpoint="/v1/completions", model="known")
            prompts = [Prompt(content=[number], output_len=4) for number in range(num_prompts)]
            return await run_load(target, prompts, shape, **options)

    return asyncio.run(main())


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_spread_asked_for(burstiness: float):
    shape = LoadShape(request_rate=5.0, burstiness=burstiness, seed=3)
    gaps = np.diff(arrival_times(20_000, shape))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    # Of gamma distributed gaps: deviation over mean is 1 / sqrt(shape); 1 for Poisson's.
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_arrivals_follow_the_seed():
    def first(seed: int) -> list[float]:
        return arrival_times(5, LoadShape(request_rate=1.0, seed=seed)).tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert first(1)[0] == 0.0


def test_no_rate_is_all_at_once():
    assert arrival_times(3, LoadShape()).tolist() == [0.0, 0.0, 0.0]
    assert arrival_times(0, LoadShape(request_rate=2.0)).tolist() == []


@pytest.mark.parametrize("concurrency", [1, 3])
def test_never_more_than_allowed_at_a_time(concurrency: int):
    server = KnownServer(tokens=2, gap_s=0.02)
    result = run(server, LoadShape(max_concurrency=concurrency), num_prompts=9)
    assert server.most_at_once == concurrency
    assert [exchange.error for exchange in result.exchanges] == [None] * 9


def test_all_at_once_without_a_limit():
    server = KnownServer(tokens=2, ttft_s=0.3)
    run(server, LoadShape(), num_prompts=9)
    assert server.most_at_once == 9


def test_warm_ups_are_sent_first_and_left_out():
    server = KnownServer(ttft_s=0.02)
    result = run(server, LoadShape(max_concurrency=2), num_prompts=7, num_warmups=3)
    assert len(result.exchanges) == 4
    assert sorted(body["prompt"][0] for body in server.bodies[:3]) == [0, 1, 2]
    assert all(exchange.sent_s >= result.start_s for exchange in result.exchanges)


def test_requests_are_not_sent_before_their_time():
    shape = LoadShape(request_rate=40.0, seed=1)
    result = run(KnownServer(tokens=1), shape, num_prompts=8)
    planned = result.start_s + arrival_times(8, shape)
    assert [one.planned_s for one in result.exchanges] == pytest.approx(planned.tolist())
    assert all(one.sent_s >= one.planned_s for one in result.exchanges)


def test_the_wait_for_a_slot_is_not_in_the_time_to_first_token():
    """One at a time, 0.1 s each, planned at once: the third waits 0.2 s for its turn."""
    result = run(KnownServer(tokens=1, ttft_s=0.1), LoadShape(max_concurrency=1), num_prompts=3)
    third = max(result.exchanges, key=lambda exchange: exchange.sent_s)
    assert third.sent_s - third.planned_s >= 0.2
    assert third.ttft_s == third.token_times_s[0] - third.sent_s


@pytest.mark.parametrize(
    ("shape", "flag"),
    [
        ({"request_rate": 0.0}, "--request-rate"),
        ({"request_rate": -1.0}, "--request-rate"),
        ({"request_rate": math.nan}, "--request-rate"),
        ({"burstiness": 0.0}, "--burstiness"),
        ({"burstiness": math.inf}, "--burstiness"),
        ({"max_concurrency": 0}, "--max-concurrency"),
    ],
)
def test_bad_shapes(shape: dict[str, float], flag: str):
    with pytest.raises(ConfigError, match=flag):
        LoadShape(**shape)
