"""The server as a process: start-up, signals, draining, what is left behind (nothing)."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.server.run import bind
from tests.server.conftest import frames

ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Process:
    """A running server."""

    handle: asyncio.subprocess.Process
    http: aiohttp.ClientSession
    url: str = ""
    lines: list[str] = field(default_factory=list)
    children: list[psutil.Process] = field(default_factory=list)

    async def until_line(self, words: str) -> str:
        assert self.handle.stderr is not None
        async with asyncio.timeout(60):
            async for raw in self.handle.stderr:
                self.lines.append(raw.decode())
                if words in self.lines[-1]:
                    return self.lines[-1]
        raise AssertionError("".join(self.lines))

    async def status(self, path: str) -> int:
        async with self.http.get(self.url + path) as response:
            return response.status

    async def until_ready(self) -> None:
        await self.until_line("ready: http")
        self.children = psutil.Process(self.handle.pid).children(recursive=True)
        assert self.children

    async def ends(self, *, timeout_s: float = 20) -> int:
        """The exit status; fails when a child outlives the server."""
        assert self.handle.stderr is not None
        async with asyncio.timeout(timeout_s):
            self.lines.append((await self.handle.stderr.read()).decode())
            status = await self.handle.wait()
        assert not [child for child in self.children if child.is_running()]
        return status


@asynccontextmanager
async def running(
    model: Path,
    factory: str,
    *,
    shutdown_s: float = 0,
    stall_s: float = 120,
    max_restarts: int = 3,
) -> AsyncIterator[Process]:
    handle = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.server.serve_fake", str(model), factory),
        *map(str, (shutdown_s, stall_s, max_restarts)),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    async with aiohttp.ClientSession() as http:
        process = Process(handle=handle, http=http)
        try:
            line = await process.until_line("listening on")
            found = re.search(r"http://127.0.0.1:\d+", line)
            assert found, line
            process.url = found[0]
            yield process
        finally:
            if handle.returncode is None:
                os.killpg(handle.pid, signal.SIGKILL)
                await handle.wait()


async def test_a_port_in_use_is_known_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port={port}: cannot listen") as caught:
            bind("127.0.0.1", port)
        assert "Choose another port" in str(caught.value)
    with pytest.raises(ConfigError, match="--host='no.such.host.invalid'"):
        bind("no.such.host.invalid", 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_serves_and_stops(tokenizer_dir: Path, number: signal.Signals) -> None:
    async with running(tokenizer_dir, "build_runner") as process:
        assert await process.status("/health") == 200
        await process.until_ready()
        assert await process.status("/ready") == 200
        body = {"prompt": "hi", "max_tokens": 5, "ignore_eos": True}
        async with process.http.post(f"{process.url}/v1/completions", json=body) as response:
            answer = await response.json()
        assert answer["usage"]["completion_tokens"] == 5
        assert answer["model"] == str(tokenizer_dir)
        process.handle.send_signal(number)
        assert await process.ends() == 0
        log = "".join(process.lines)
        assert re.search(r"start-up took \d", log)
        assert "POST /v1/completions 200" in log
        assert "Traceback" not in log


async def test_a_signal_while_loading(tokenizer_dir: Path) -> None:
    async with running(tokenizer_dir, "build_never") as process:
        assert await process.status("/health") == 200
        assert await process.status("/ready") == 503
        while not process.children:
            await asyncio.sleep(0.05)
            process.children = psutil.Process(process.handle.pid).children(recursive=True)
        process.handle.send_signal(signal.SIGTERM)
        assert await process.ends() == 0


async def test_an_engine_that_cannot_start(tokenizer_dir: Path) -> None:
    async with running(tokenizer_dir, "build_bad_config") as process:
        assert await process.ends() != 0
        assert "ConfigError" in "".join(process.lines)


@pytest.mark.parametrize("shutdown_s", [0, 30])
async def test_draining(tokenizer_dir: Path, shutdown_s: float) -> None:
    """With time to drain a stream ends as it should, without it ends at once, with an error."""
    async with running(tokenizer_dir, "build_slow", shutdown_s=shutdown_s) as process:
        await process.until_ready()
        body = {"prompt": "hi", "max_tokens": 50, "ignore_eos": True, "stream": True}
        async with process.http.post(f"{process.url}/v1/completions", json=body) as response:
            first = await response.content.readuntil(b"\n\n")
            process.handle.send_signal(signal.SIGTERM)
            if shutdown_s:
                await process.until_line("shutting down")
                # On a connection of its own: the socket still listens, and says what is the case.
                async with (
                    aiohttp.ClientSession() as other,
                    other.post(f"{process.url}/v1/completions", json=body) as late,
                ):
                    assert late.status == 503
                    assert int(late.headers["Retry-After"]) >= 1
                    assert "shutting down" in (await late.json())["error"]["message"]
            data = frames((first + await response.content.read()).decode())
        assert await process.ends() == 0
    if shutdown_s:
        assert data[-1] == "[DONE]"
        assert data[-2]["choices"][0]["finish_reason"] == "length"
    else:
        assert data[-1]["error"]["code"] == 503


async def test_a_second_signal_hurries(tokenizer_dir: Path) -> None:
    async with running(tokenizer_dir, "build_slow", shutdown_s=600) as process:
        await process.until_ready()
        body = {"prompt": "hi", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        async with process.http.post(f"{process.url}/v1/completions", json=body) as response:
            first = await response.content.readuntil(b"\n\n")
            process.handle.send_signal(signal.SIGTERM)
            await process.until_line("shutting down")
            assert process.handle.returncode is None
            process.handle.send_signal(signal.SIGTERM)
            data = frames((first + await response.content.read()).decode())
        assert await process.ends() == 0
        assert data[-1]["error"]["code"] == 503
