"""Two hundred streams at once, a third of them left in the middle, three times over."""

import asyncio
import json
import random
from typing import Any, NamedTuple

import aiohttp
import psutil
import pytest

from tests.e2e.api import COMPLETIONS, Api, until

NUM_STREAMS, NUM_ROUNDS = 200, 3
PROMPTS = [f"{word} there was number {n}" for n, word in enumerate(["Once", "Here", "The fox"] * 7)]
MAX_GROWTH_BYTES = 24 * 2**20


class Memory(NamedTuple):
    server: int
    core: int


def memory_of(api: Api) -> Memory:
    server = psutil.Process(api.process.pid)
    [core] = server.children()
    return Memory(server.memory_info().rss, core.memory_info().rss)


def body_of(index: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[index % len(PROMPTS)],
        "max_tokens": 12 + index % 5,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def stream(
    session: aiohttp.ClientSession, url: str, index: int, leave_after: int | None
) -> list[int] | None:
    """The stream's tokens; None when we left it."""
    tokens: list[int] = []
    body = {**body_of(index), "stream": True}
    async with session.post(url + COMPLETIONS, json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                frame = json.loads(line.removeprefix(b"data: "))
                assert "error" not in frame, frame
                tokens += frame["choices"][0].get("token_ids") or []
            if leave_after is not None and len(tokens) >= leave_after:
                response.close()
                return None
    return tokens


async def one_round(api: Api, source: random.Random) -> list[list[int] | None]:
    leave = [source.choice([1, 3, 6]) if index % 3 == 0 else None for index in range(NUM_STREAMS)]
    source.shuffle(leave)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        jobs = (stream(session, api.url, index, at) for index, at in enumerate(leave))
        return list(await asyncio.gather(*jobs))


def metric(api: Api, name: str) -> float:
    return sum(v for key, v in api.metrics().items() if key.startswith(f"jaxinfer:{name}{{"))


@pytest.mark.timeout(300)
def test_the_others_are_right_and_nothing_is_left(api: Api) -> None:
    expected = [api.complete(**body_of(index)).token_ids for index in range(len(PROMPTS) * 5)]
    source = random.Random(7)
    memories: list[Memory] = []
    for _ in range(NUM_ROUNDS):
        results = asyncio.run(one_round(api, source))
        stayed = [index for index, tokens in enumerate(results) if tokens is not None]
        assert NUM_STREAMS * 0.6 < len(stayed) < NUM_STREAMS * 0.7
        for index in stayed:
            assert results[index] == expected[index % len(expected)], f"stream {index}"
        until(lambda: metric(api, "num_requests_running") == 0)
        assert metric(api, "num_requests_waiting") == 0
        assert metric(api, "kv_cache_usage_perc") == 0
        memories.append(memory_of(api))
    assert metric(api, "engine_restarts_total") == 0
    assert metric(api, "failed_steps_total") == 0
    for first, last in zip(memories[0], memories[-1], strict=True):
        assert last - first < MAX_GROWTH_BYTES, memories
