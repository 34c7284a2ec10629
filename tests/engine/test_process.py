"""The core as a real process: start, end, and every way to die."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jaxinfer import SamplingParams
from jaxinfer.config.schema import EngineConfig
from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.engine.client import ProcessClient
from jaxinfer.errors import ConfigError, EngineDeadError
from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.engine.conftest import FAKE, EngineMaker, until
from tests.engine.fake_runner import expected_output

LONG = SamplingParams(max_tokens=50, ignore_eos=True, temperature=0)
ROOT = Path(__file__).parents[2]


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(pid: int, timeout_s: float = 3.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while is_running(pid):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def core_pid(engine: AsyncEngine) -> int:
    client = engine._client
    assert isinstance(client, ProcessClient)
    assert client.pid is not None
    return client.pid


@pytest.fixture
def socket_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the engines of a test make their sockets. (pytest's own paths are too long.)"""
    with tempfile.TemporaryDirectory(prefix="t") as root:
        monkeypatch.setattr(tempfile, "tempdir", root)
        yield Path(root)


def is_empty(directory: Path) -> bool:
    return not any(directory.iterdir())


async def start_hanging(config: EngineConfig) -> tuple[ProcessClient, asyncio.Task]:
    """A client whose core loads for ever, and its start()."""
    hanging = asyncio.Event()
    client = ProcessClient(
        config,
        runner_factory=FAKE + "build_never",
        on_progress=lambda phase, *_: hanging.set() if phase == "hang" else None,
    )
    task = asyncio.create_task(client.start())
    await asyncio.wait_for(hanging.wait(), 20)
    return client, task


async def finish(engine: AsyncEngine, prompt: str = "hello") -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate(prompt, LONG, request_id="r", output_kind="delta"):
        for completion in output.outputs:
            tokens += completion.token_ids
    return tokens


async def test_a_life(config: EngineConfig, tokenizer: Tokenizer, socket_root: Path) -> None:
    phases: list[tuple[str, int, int]] = []
    client = ProcessClient(
        config,
        runner_factory=FAKE + "build_runner",
        on_progress=lambda *progress: phases.append(progress),
    )
    engine = AsyncEngine(client, tokenizer, "fake")
    assert not engine.is_ready
    info = await engine.start()
    assert engine.is_ready
    assert info.max_model_len == 64
    assert info.device == "fake"
    assert phases == [("start the engine", 0, 0), ("load weights", 0, 2), ("load weights", 2, 2)]
    assert is_empty(socket_root), "the sockets' files go once all are connected"
    assert await finish(engine) == expected_output(list(b"hello"), LONG, 50)
    pid = core_pid(engine)
    start_s = time.monotonic()
    await engine.close()
    await engine.close()
    assert time.monotonic() - start_s < 2
    assert not is_running(pid)
    assert client._child is not None
    assert client._child.exit_code == 0, "it ended in order"
    with pytest.raises(EngineDeadError):
        await finish(engine)


async def test_the_server_side_imports_no_jax() -> None:
    code = (
        "import sys, jaxinfer.engine.client, jaxinfer.engine.async_engine, jaxinfer.engine.offline;"
        "import jaxinfer.engine.process;"
        "sys.exit(any(name.split('.')[0] in ('jax', 'jaxlib', 'torch') for name in sys.modules))"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT)
    assert await process.wait() == 0


@pytest.mark.parametrize(
    ("factory", "kind", "message"),
    [
        ("build_bad_config", ConfigError, "not for this model"),
        ("build_crash", EngineDeadError, "ZeroDivisionError: while loading"),
        ("build_exit", EngineDeadError, "(?s)with status 7.*about to vanish"),
    ],
)
async def test_a_core_that_cannot_start_says_why(
    config: EngineConfig,
    socket_root: Path,
    factory: str,
    kind: type[Exception],
    message: str,
) -> None:
    client = ProcessClient(config, runner_factory=FAKE + factory)
    with pytest.raises(kind, match=message):
        await client.start()
    assert client.pid is not None
    assert not is_running(client.pid)
    assert not client.is_alive
    assert is_empty(socket_root)


async def test_a_cancelled_start_leaves_nothing(config: EngineConfig, socket_root: Path) -> None:
    client, task = await start_hanging(config)
    assert is_empty(socket_root), "not even while it loads"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.pid is not None
    assert not is_running(client.pid)


async def test_closing_while_it_starts_ends_the_start(config: EngineConfig) -> None:
    client, task = await start_hanging(config)
    await client.close()
    with pytest.raises(EngineDeadError, match="stopped"):
        await task
    assert client.pid is not None
    assert not is_running(client.pid)


async def test_closing_before_the_hello(config: EngineConfig, socket_root: Path) -> None:
    client = ProcessClient(config, runner_factory=FAKE + "build_runner")
    task = asyncio.create_task(client.start())
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(EngineDeadError, match="stopped"):
        await task
    assert client.pid is not None
    assert not is_running(client.pid)
    assert is_empty(socket_root)


async def test_killing_the_core_fails_open_requests_at_once(running_engine: EngineMaker) -> None:
    async with running_engine("build_slow") as engine:
        tasks = [asyncio.create_task(finish(engine)) for _ in range(3)]
        await until(lambda: engine.stats.num_steps_total >= 2)
        start_s = time.monotonic()
        os.kill(core_pid(engine), signal.SIGKILL)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
            assert "by signal 9" in str(result)
        assert time.monotonic() - start_s < 0.5
        assert not engine.is_alive
        assert not engine.is_ready
        assert engine.num_inflight == 0
        with pytest.raises(EngineDeadError, match="by signal 9"):
            await finish(engine)


async def test_a_device_that_breaks_is_told_with_its_reason(running_engine: EngineMaker) -> None:
    async with running_engine("build_failing") as engine:
        with pytest.raises(EngineDeadError, match="RuntimeError: the device is lost"):
            await finish(engine)
        assert not engine.is_alive


async def test_ctrl_c_in_the_terminal_does_not_reach_the_core(running_engine: EngineMaker) -> None:
    async with running_engine("build_slow") as engine:
        pid = core_pid(engine)
        assert os.getsid(pid) != os.getsid(0)
        os.kill(pid, signal.SIGINT)
        assert len(await finish(engine)) == 50


PARENT = """
import asyncio, sys
from jaxinfer.config.schema import EngineConfig
from jaxinfer.engine.client import ProcessClient

async def main():
    client = ProcessClient(
        EngineConfig(),
        runner_factory="tests.engine.fake_runner:{factory}",
        on_progress=lambda phase, *_: print(phase, client.pid, flush=True),
    )
    try:
        await client.start()
        print("ready", client.pid, flush=True)
        await asyncio.sleep(60)
    finally:
        await client.close()

{start}
"""


def start_parent(*, factory: str = "build_runner", in_thread: bool = False) -> tuple:
    """A program (without `if __name__`) that runs an engine; (process, pid of its core)."""
    start = "asyncio.run(main())"
    if in_thread:
        start = f"import threading; threading.Thread(target=lambda: {start}).start()"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(factory=factory, start=start)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert parent.stdout is not None
    awaited = "hang" if factory == "build_never" else "ready"
    for line in parent.stdout:
        phase, _, pid = line.rpartition(" ")
        if phase == awaited:
            return parent, int(pid)
    raise AssertionError("the parent did not start")


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("factory", ["build_runner", "build_never"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_death_of_the_parent_leaves_an_orphan(
    how: signal.Signals, factory: str, in_thread: bool
) -> None:
    if in_thread and how == signal.SIGINT:
        pytest.skip("the program itself ignores Ctrl-C then")
    parent, pid = start_parent(factory=factory, in_thread=in_thread)
    try:
        parent.send_signal(how)
        assert wait_until_gone(pid)
        assert parent.wait(timeout=10) != 0
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
