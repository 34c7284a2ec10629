"""Connections on which nothing (or half a header) comes, and answers that nobody reads."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import NamedTuple

import pytest
from aiohttp import web

from jaxinfer.config.schema import ServerConfig
from jaxinfer.server import run
from jaxinfer.server.app import create_app_around, make_runner
from jaxinfer.server.state import ServerState

TIMEOUT_S = 0.8
SLOW_S = 2 * TIMEOUT_S
GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"


class Server(NamedTuple):
    port: int
    ended: asyncio.Event  # set when the endless answer was given up

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """Gives up silent connections, and readers that do not read, after TIMEOUT_S."""
    monkeypatch.setattr(run, "UNREAD_TIMEOUT_S", TIMEOUT_S)
    state = ServerState(ServerConfig(port=0))
    app = create_app_around(state)
    ended = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:  # noqa: ARG001 - a handler
        await asyncio.sleep(SLOW_S)
        return web.Response(text="late")

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(2**16))
        finally:
            ended.set()

    app.add_routes([web.get("/slow", slow), web.get("/endless", endless)])
    runner = make_runner(app)
    await runner.setup()
    with run.bind("127.0.0.1", 0) as listener:
        await web.SockSite(runner, listener).start()
        sweeper = asyncio.create_task(state.connections.close_silent(runner, TIMEOUT_S))
        yield Server(listener.getsockname()[1], ended)
        sweeper.cancel()
        await asyncio.gather(sweeper, return_exceptions=True)
        await runner.cleanup()


async def until_closed(reader: asyncio.StreamReader, each: Callable[[], None]) -> None:
    """Fails when the server keeps the connection."""
    async with asyncio.timeout(15):
        with suppress(ConnectionError):
            while not reader.at_eof():
                each()
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 0.05)


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
async def test_half_a_header_is_given_up(server: Server, sent: bytes) -> None:
    reader, writer = await server.connect()
    writer.write(sent)
    begin_s = time.monotonic()
    await until_closed(reader, lambda: None)
    assert time.monotonic() - begin_s > TIMEOUT_S / 2
    writer.close()


async def test_a_header_that_drips_is_given_up(server: Server) -> None:
    reader, writer = await server.connect()
    writer.write(b"GET /health HTTP/1.1\r\nX: ")

    def drip() -> None:
        if not writer.is_closing():
            writer.write(b"x")

    await until_closed(reader, drip)
    writer.close()


async def test_a_connection_that_is_used_stays(server: Server) -> None:
    """Also while its request takes longer than the limit; once idle it is closed."""
    reader, writer = await server.connect()
    for path, answer in ((b"/slow", b"late"), (b"/health", b"ok"), (b"/slow", b"late")):
        writer.write(GET % path)
        async with asyncio.timeout(15):
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(answer)
    await until_closed(reader, lambda: None)
    writer.close()


@pytest.mark.skipif(not hasattr(run.socket, "TCP_USER_TIMEOUT"), reason="the kernel's business")
async def test_an_answer_that_nobody_reads_is_given_up(server: Server) -> None:
    _, writer = await server.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(GET % b"/endless")
    async with asyncio.timeout(30):
        await server.ended.wait()
    writer.close()
