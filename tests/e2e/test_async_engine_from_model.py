"""AsyncEngine.from_model: a core that is killed under an asyncio program comes back by itself."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from jaxinfer import AsyncEngine, SamplingParams
from jaxinfer.engine.supervisor import SupervisionPolicy
from jaxinfer.errors import EngineDeadError
from tests.e2e.conftest import MAX_MODEL_LEN, MAX_NUM_SEQS
from tests.quick_xla import QUICK_XLA_FLAGS

ENGINE_ARGS = {
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": MAX_NUM_SEQS,
    "max_num_batched_tokens": 64,
    "token_buckets": [64],
}
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 6, 7]}


async def tokens(engine: AsyncEngine, started: asyncio.Event | None = None) -> list[int]:
    last: list[int] = []
    stream = engine.generate(PROMPT, LONG, request_id="r")
    async with aclosing(stream):
        async for output in stream:
            last = output.outputs[0].token_ids
            if started is not None:
                started.set()
    return last


@pytest.fixture
async def engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncEngine]:
    monkeypatch.setenv("XLA_FLAGS", QUICK_XLA_FLAGS)  # the server's: its programs are in the cache
    policy = SupervisionPolicy(max_restarts=1)
    engine = AsyncEngine.from_model(str(tiny_model), supervision=policy, **ENGINE_ARGS)
    await engine.start()
    yield engine
    await engine.close()


def core_of_this_process() -> psutil.Process:
    (core,) = [
        child
        for child in psutil.Process().children()
        if any("jaxinfer.engine.process" in part for part in child.cmdline())
    ]
    return core


async def test_a_killed_core_comes_back(engine: AsyncEngine) -> None:
    expected = await tokens(engine)
    started = asyncio.Event()
    open_request = asyncio.create_task(tokens(engine, started))
    await started.wait()
    core_of_this_process().kill()
    with pytest.raises(EngineDeadError, match="being restarted"):
        await open_request
    assert engine.is_alive
    deadline_s = time.monotonic() + 60
    while not engine.is_ready:
        assert time.monotonic() < deadline_s, "the core did not come back"
        await asyncio.sleep(0.05)
    assert await tokens(engine) == expected
    assert engine.stats.num_restarts_total == 1
    core_of_this_process().kill()  # beyond what the policy allows
    death = await asyncio.wait_for(engine.wait_dead(), 30)
    assert "given up" in str(death)
