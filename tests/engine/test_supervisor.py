"""Cores that die, stall and come back: real processes, killed and hung in earnest."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer import AsyncEngine
from jaxinfer.config.schema import EngineConfig
from jaxinfer.engine.client import ProcessClient
from jaxinfer.engine.supervisor import SupervisedClient, SupervisionPolicy
from jaxinfer.errors import ConfigError, EngineDeadError
from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.engine.conftest import FAKE, until
from tests.engine.fake_runner import expected_output
from tests.engine.test_process import LONG, finish, is_running

STALL_S = 2.0  # longer than a busy machine holds up a core that works
SILENT_START_S = 3.0  # longer than a busy machine takes to start Python
POLICY = SupervisionPolicy(first_delay_s=0.05)
EXPECTED = expected_output(list(b"hello"), LONG, 50)


class Supervised:
    """An engine, and the pids of the cores it has had."""

    def __init__(self, engine: AsyncEngine, client: SupervisedClient) -> None:
        self.engine = engine
        self.client = client
        self.pids: list[int] = []

    def kill(self) -> None:
        pid = self.client.pid
        assert pid is not None
        self.pids.append(pid)
        os.kill(pid, signal.SIGKILL)

    async def is_back(self) -> None:
        await until(lambda: self.engine.is_ready, timeout_s=20)

    async def busy(self) -> None:
        steps = self.engine.stats.num_steps_total
        await until(lambda: self.engine.stats.num_steps_total >= steps + 2)


Supervise = Callable[..., AbstractAsyncContextManager[Supervised]]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Files in it tell `build_if_allowed` what to do."""
    return tmp_path


@pytest.fixture
def supervise(config: EngineConfig, tokenizer: Tokenizer, model_dir: Path) -> Supervise:
    own = replace(config, model=replace(config.model, model=str(model_dir)))

    @asynccontextmanager
    async def make(
        factory: str = "build_slow", policy: SupervisionPolicy = POLICY
    ) -> AsyncIterator[Supervised]:
        client = SupervisedClient(lambda: ProcessClient(own, runner_factory=FAKE + factory), policy)
        supervised = Supervised(AsyncEngine(client, tokenizer, "fake"), client)
        await supervised.engine.start()
        try:
            yield supervised
        finally:
            last = client.pid
            await supervised.engine.close()
            assert not [pid for pid in (*supervised.pids, last) if pid and is_running(pid)]

    return make


async def test_a_killed_core_comes_back(supervise: Supervise) -> None:
    async with supervise() as one:
        engine = one.engine
        assert await finish(engine) == EXPECTED
        tasks = [asyncio.create_task(finish(engine)) for _ in range(3)]
        await one.busy()
        steps_before, killed_s = engine.stats.num_steps_total, time.monotonic()
        one.kill()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
            assert str(result) == "The engine core ended by signal 9. It is being restarted."
        assert time.monotonic() - killed_s < 1.0
        assert (engine.is_ready, engine.is_alive) == (False, True)
        assert "restarted" in (engine.outage or "")
        assert engine.stats.num_running == engine.stats.kv_usage == engine.num_inflight == 0
        with pytest.raises(EngineDeadError, match="restarted"):
            await finish(engine)
        await one.is_back()
        assert engine.outage is None
        assert engine.stats.num_restarts_total == 1
        assert engine.stats.num_steps_total >= steps_before, "totals go on"
        assert await finish(engine) == EXPECTED
        assert engine.stats.num_steps_total >= steps_before + 50
        assert engine.stats.num_restarts_total == 1


async def test_the_budget_of_restarts_ends(supervise: Supervise) -> None:
    async with supervise(policy=replace(POLICY, max_restarts=1)) as one:
        one.kill()
        await until(lambda: not one.engine.is_ready)
        await one.is_back()
        one.kill()
        death = await asyncio.wait_for(one.engine.wait_dead(), 10)
        assert "lost again after 1 restarts within 600 s" in str(death)
        assert "by signal 9" in str(death)
        assert not one.engine.is_alive
        with pytest.raises(EngineDeadError, match="given up"):
            await finish(one.engine)


async def test_old_restarts_are_forgotten(supervise: Supervise) -> None:
    async with supervise(policy=replace(POLICY, max_restarts=1, window_s=0.0)) as one:
        for _ in range(2):
            one.kill()
            await until(lambda: not one.engine.is_ready)
            await one.is_back()
        assert one.engine.stats.num_restarts_total == 2


async def test_a_restart_that_dies_counts(supervise: Supervise, model_dir: Path) -> None:
    async with supervise("build_if_allowed", replace(POLICY, max_restarts=2)) as one:
        (model_dir / "die").touch()
        one.kill()
        death = await asyncio.wait_for(one.engine.wait_dead(), 20)
        assert "after 2 restarts" in str(death)
        assert "with status 7" in str(death)


async def test_no_restart_where_none_is_wanted(supervise: Supervise) -> None:
    async with supervise(policy=replace(POLICY, max_restarts=0)) as one:
        one.kill()
        assert "by signal 9" in str(await asyncio.wait_for(one.engine.wait_dead(), 5))


async def test_a_first_start_that_fails_is_an_error(config: EngineConfig) -> None:
    client = SupervisedClient(
        lambda: ProcessClient(config, runner_factory=FAKE + "build_bad_config"), POLICY
    )
    with pytest.raises(ConfigError):
        await client.start()
    await client.close()


async def test_a_core_that_dies_after_the_stop_stays_dead(supervise: Supervise) -> None:
    async with supervise() as one:
        task = asyncio.create_task(finish(one.engine))
        await one.busy()
        one.client.stop_restarting()
        one.kill()
        with pytest.raises(EngineDeadError, match="by signal 9") as caught:
            await task
        assert "restarted" not in str(caught.value)
        assert not one.engine.is_alive
        assert one.engine.stats.num_restarts_total == 0


@pytest.mark.parametrize("how", ["stop", "close"])
async def test_a_restart_can_be_broken_off(supervise: Supervise, model_dir: Path, how: str) -> None:
    async with supervise("build_if_allowed") as one:
        (model_dir / "hang").touch()
        one.kill()
        await until(lambda: one.client.pid not in (None, one.pids[0]), timeout_s=10)
        assert not one.engine.is_ready
        if how == "stop":
            one.client.stop_restarting()
            await asyncio.wait_for(one.engine.wait_dead(), 10)


async def test_a_stalled_core_is_told_dumped_and_replaced(
    supervise: Supervise, capfd: pytest.CaptureFixture[str]
) -> None:
    """It hangs in C with Python's lock held, deaf to SIGTERM."""
    async with supervise("build_stalling", replace(POLICY, stall_timeout_s=STALL_S)) as one:
        assert one.client.pid is not None
        one.pids.append(one.client.pid)
        neighbour = asyncio.create_task(finish(one.engine))
        await one.busy()
        for task in (neighbour, asyncio.create_task(finish(one.engine, "~ stall"))):
            with pytest.raises(EngineDeadError, match="has stalled: no step ended for 2 s"):
                await asyncio.wait_for(task, 10)
        assert not one.engine.is_ready
        await one.is_back()
        assert not is_running(one.pids[0])
        assert await finish(one.engine) == EXPECTED
    log = capfd.readouterr().err
    assert "_hang_in_c" in log, "its stacks are in the log"


async def test_neither_idle_nor_slow_nor_left_is_stalled(supervise: Supervise) -> None:
    async with supervise(policy=replace(POLICY, stall_timeout_s=STALL_S)) as one:
        await asyncio.sleep(1.3 * STALL_S)  # nothing to do
        assert await finish(one.engine) == EXPECTED  # a second of steps of 20 ms
        task = asyncio.create_task(finish(one.engine))
        await one.busy()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(1.3 * STALL_S)  # what nobody waits for any more
        assert one.engine.is_ready
        assert await finish(one.engine) == EXPECTED
        assert one.engine.stats.num_restarts_total == 0


async def test_impatient_clients_do_not_hide_a_stalled_core(supervise: Supervise) -> None:
    """Each gives up long before the core counts as stalled, and another one comes."""
    async with supervise("build_stalling", replace(POLICY, stall_timeout_s=STALL_S)) as one:
        assert one.client.pid is not None
        one.pids.append(one.client.pid)
        start_s = time.monotonic()
        while one.engine.is_ready:
            assert time.monotonic() - start_s < 5 * STALL_S, "nobody notices"
            with suppress(TimeoutError, EngineDeadError):
                await asyncio.wait_for(finish(one.engine, "~ stall"), STALL_S / 4)
            await asyncio.sleep(STALL_S / 8)
        await one.is_back()
        assert await finish(one.engine) == EXPECTED


async def test_a_restart_that_hangs_is_lost_too(supervise: Supervise, model_dir: Path) -> None:
    policy = replace(POLICY, silent_start_s=SILENT_START_S, max_restarts=5)
    async with supervise("build_if_allowed", policy) as one:
        (model_dir / "hang").touch()
        one.kill()
        await until((model_dir / "hanging").exists, timeout_s=10)
        one.pids.append(one.client.pid or 0)
        (model_dir / "hang").unlink()
        await until(lambda: one.client.pid not in (None, *one.pids), timeout_s=20)
        await one.is_back()
        assert await finish(one.engine) == EXPECTED
        assert not is_running(one.pids[1])


def test_the_delays_double_up_to_a_bound() -> None:
    delays = [SupervisionPolicy().delay_s(number) for number in range(8)]
    assert delays == [0, 1, 2, 4, 8, 16, 30, 30]
