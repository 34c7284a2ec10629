"""What clients of a real server see while its engine core is killed, hung and restarted."""

import asyncio
import json
import os
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import pytest

from tests.server.conftest import frames
from tests.server.test_run import Process, running

BODY: dict[str, Any] = {"prompt": "hi", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


class Got(NamedTuple):
    status: int
    headers: Any
    text: str


async def post(process: Process, **change: Any) -> Got:
    url = f"{process.url}/v1/completions"
    async with process.http.post(url, json=BODY | change) as response:
        return Got(response.status, response.headers, await response.text())


async def get(process: Process, path: str) -> Got:
    async with process.http.get(process.url + path) as response:
        return Got(response.status, response.headers, await response.text())


async def metric(process: Process, name: str) -> float:
    """The sum over labels."""
    lines = (await get(process, "/metrics")).text.splitlines()
    values = [line.split()[-1] for line in lines if line.startswith(f"jaxinfer:{name}{{")]
    assert values, name
    return sum(map(float, values))


async def eventually(is_so: Callable[[], Awaitable[bool]], *, timeout_s: float = 30) -> None:
    """Asks again and again: a process next door has no event to wait for."""
    async with asyncio.timeout(timeout_s):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until_running(process: Process, number: int) -> psutil.Process:
    """The core, which runs so many requests now."""

    async def is_so() -> bool:
        return await metric(process, "num_requests_running") == number

    await eventually(is_so)
    [core] = psutil.Process(process.handle.pid).children()
    return core


async def until_status(process: Process, path: str, status: int, words: str = "") -> Got:
    last: list[Got] = []

    async def is_so() -> bool:
        last[:] = [await get(process, path)]
        return last[0].status == status and words in last[0].text

    await eventually(is_so)
    return last[0]


def check_503(got: Got, words: str) -> None:
    assert got.status == 503
    assert int(got.headers["Retry-After"]) >= 1
    error = json.loads(got.text)["error"]
    assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
    assert words in error["message"]


async def test_a_killed_core(tokenizer_dir: Path) -> None:
    async with running(tokenizer_dir, "build_slow") as process:
        await process.until_ready()
        expected = await post(process)
        whole = asyncio.create_task(post(process, max_tokens=1500))
        stream = asyncio.create_task(post(process, stream=True, max_tokens=1500))
        core = await until_running(process, 2)
        before = {
            name: await metric(process, name)
            for name in ("engine_steps_total", "generation_tokens_total", "request_success_total")
        }
        core.kill()
        words = "The engine core ended by signal 9. It is being restarted."
        check_503(await whole, words)
        status, _, text = await stream
        assert status == 200
        last = frames(text)[-1]["error"]
        assert (last["code"], last["message"]) == (503, words)
        for path in ("/health", "/ready"):
            check_503(await until_status(process, path, 503), words)
        check_503(await post(process), words)
        await until_status(process, "/health", 200)
        await until_status(process, "/ready", 200)
        again = await post(process)
        assert again.status == 200
        choices = [json.loads(got.text)["choices"] for got in (again, expected)]
        assert choices[0] == choices[1]
        for name, value in before.items():
            assert await metric(process, name) >= value
        assert await metric(process, "engine_restarts_total") == 1
        assert await metric(process, "num_requests_running") == 0
        process.handle.send_signal(signal.SIGTERM)
        assert await process.ends() == 0


async def test_a_server_whose_core_cannot_be_kept_ends(tokenizer_dir: Path) -> None:
    async with running(tokenizer_dir, "build_slow", max_restarts=1) as process:
        await process.until_ready()
        (await until_running(process, 0)).kill()
        await until_status(process, "/ready", 503)
        await until_status(process, "/ready", 200)
        (await until_running(process, 0)).kill()
        assert await process.ends() != 0
        assert "lost again after 1 restarts" in "".join(process.lines)


async def test_a_stalled_core(tokenizer_dir: Path) -> None:
    async with running(tokenizer_dir, "build_slow", stall_s=2) as process:
        await process.until_ready()
        stream = asyncio.create_task(post(process, stream=True, max_tokens=1500))
        core = await until_running(process, 1)
        assert (await get(process, "/health")).status == 200
        core.suspend()
        words = "The engine core has stalled: no step ended for 2 s."
        await until_status(process, "/health", 503, words)
        async with asyncio.timeout(10):
            assert words in (await stream).text
        await until_status(process, "/ready", 200)
        assert (await post(process, max_tokens=5)).status == 200
        assert not core.is_running()
        process.handle.send_signal(signal.SIGTERM)
        assert await process.ends() == 0
        assert "Current thread" in "".join(process.lines), "its stacks are in the log"


async def test_a_core_that_dies_while_draining_stays_dead(tokenizer_dir: Path) -> None:
    async with running(tokenizer_dir, "build_slow", shutdown_s=60) as process:
        await process.until_ready()
        stream = asyncio.create_task(post(process, stream=True, max_tokens=1500))
        core = await until_running(process, 1)
        process.handle.send_signal(signal.SIGTERM)
        await process.until_line("shutting down")
        core.kill()
        assert frames((await stream).text)[-1]["error"]["code"] == 503
        assert await process.ends() == 0
        assert "is restarted" not in "".join(process.lines)


async def test_a_signal_while_restarting(tokenizer_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tokenizer_dir, tmp_path / "model"))
    async with running(model, "build_if_allowed") as process:
        await process.until_ready()
        [core] = process.children
        (model / "hang").touch()
        core.kill()
        await until_status(process, "/ready", 503, "is being restarted")
        await until_status(process, "/health", 503, "(hang)")
        process.children += psutil.Process(process.handle.pid).children()
        process.handle.send_signal(signal.SIGTERM)
        assert await process.ends() == 0


async def test_a_full_queue_says_when_to_come_again(tokenizer_dir: Path) -> None:
    async with running(tokenizer_dir, "build_slow") as process:
        await process.until_ready()
        # What could never wait is no matter of trying again.
        chat = {"messages": [{"role": "user", "content": "hi"}], "n": 5}
        async with process.http.post(f"{process.url}/v1/chat/completions", json=chat) as response:
            assert response.status == 400
            error = (await response.json())["error"]
        assert error["param"] == "n"
        assert (
            "n=5 asks for 5 completions at once; this server queues at most 4" in error["message"]
        )
        assert (await post(process, prompt=["hi"] * 5)).status == 400
        assert (await post(process, prompt=["hi"] * 2, n=2, max_tokens=2)).status == 200
        # Eight run, four wait, the others are turned away.
        tasks = []
        for number in (4, 8):
            tasks += [asyncio.create_task(post(process, max_tokens=200)) for _ in range(4)]
            await until_running(process, number)
        tasks += [asyncio.create_task(post(process, max_tokens=200)) for _ in range(12)]
        results = await asyncio.gather(*tasks)
        full = [got for got in results if got.status == 429]
        assert len(full) == 8
        assert all(int(got.headers["Retry-After"]) >= 1 for got in full)
        assert json.loads(full[0].text)["error"]["type"] == "TooManyRequestsError"
        assert {got.status for got in results} == {200, 429}
        assert (
            len({json.loads(g.text)["choices"][0]["text"] for g in results if g not in full}) == 1
        )
        process.handle.send_signal(signal.SIGTERM)
        assert await process.ends() == 0


async def test_a_reader_that_never_reads_costs_only_itself(tokenizer_dir: Path) -> None:
    """It gets what fits into the sockets' buffers; the rest waits as one output, not as frames."""
    async with running(tokenizer_dir, "build_runner") as process:
        await process.until_ready()
        host, port = process.url.removeprefix("http://").split(":")
        # Three requests: even if all come in one turn, the queue of four takes one more.
        body = json.dumps(BODY | {"max_tokens": 1900, "logprobs": 20, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        expected = (await post(process)).text
        with ExitStack() as deaf:
            for _ in range(3):
                connection = deaf.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect((host, int(port)))
                connection.sendall(head.encode() + body.encode())
            for _ in range(3):
                got = await post(process)
                assert json.loads(got.text)["choices"] == json.loads(expected)["choices"]
            await until_running(process, 0)
            assert (await get(process, "/health")).status == 200
        process.handle.send_signal(signal.SIGTERM)
        assert await process.ends() == 0


async def test_kill_leaves_nothing(tokenizer_dir: Path) -> None:
    """kill -9 of the HTTP process, with a supervisor that could have started cores."""
    async with running(tokenizer_dir, "build_slow") as process:
        await process.until_ready()
        [core] = process.children
        os.kill(process.handle.pid, signal.SIGKILL)
        await process.handle.wait()
        _, alive = await asyncio.to_thread(psutil.wait_procs, [core], timeout=10)
        assert not alive
        with pytest.raises(aiohttp.ClientError):
            await get(process, "/health")
