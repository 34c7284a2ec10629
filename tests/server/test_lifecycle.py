"""Clients that leave, dawdle or are half there; engines that are full, slow, broken or dead."""

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from jaxinfer.config.schema import ServerConfig
from jaxinfer.server import sse
from jaxinfer.server.app import create_app_around, make_runner
from jaxinfer.server.state import ServerState
from tests.server.conftest import MODEL, Serve, Served, frames
from tests.server.fake_core import expected_text
from tests.server.test_bad_input import GOOD, check_envelope

PATHS = list(GOOD)


def long_body(path: str, **change: Any) -> dict[str, Any]:
    return {**GOOD[path], "max_tokens": 100, **change}


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - a condition of any kind has no event
            await asyncio.sleep(0.005)


async def aborts_counted(served: Served) -> float:
    _, text = await served.get("/metrics")
    name = 'jaxinfer:request_success_total{finished_reason="abort",model_name="tiny"}'
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_a_client_that_leaves_frees_its_work(
    served: Served, path: str, *, stream: bool
) -> None:
    served.core.step_s = 0.02
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(long_body(path, stream=stream, n=2)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await until(lambda: len(served.core.open) == 2)
    if stream:
        await reader.readuntil(b"data: ")
    writer.close()
    await until(lambda: not served.core.open, timeout_s=1.0)
    assert len(served.core.aborted) == 2
    assert served.state.num_inflight == 0
    assert await aborts_counted(served) == 2
    served.core.step_s = 0.0
    await served.still_works()


async def test_leaving_before_the_first_token(served: Served) -> None:
    served.core.is_frozen = True
    task = asyncio.create_task(served.post(PATHS[0], long_body(PATHS[0], stream=True)))
    await until(lambda: served.core.open)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: not served.core.open)
    assert await aborts_counted(served) == 1


async def test_leaving_a_request_of_many_prompts(served: Served) -> None:
    served.core.step_s = 0.02
    body = long_body(PATHS[0], prompt=["a", "b", "c"])
    task = asyncio.create_task(served.post(PATHS[0], body))
    await until(lambda: len(served.core.open) == 3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: not served.core.open)
    assert await aborts_counted(served) == 3


async def test_half_a_request_costs_nothing(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    for sent in (b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        await writer.drain()
        await served.still_works()
        writer.close()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(head + b'{"prompt": ')
    await writer.drain()
    await served.still_works()
    writer.close()
    await served.still_works()


async def test_a_body_that_never_ends_is_given_up(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxinfer.server.body.BODY_TIMEOUT_S", 0.05)
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_stream_is_whole_and_needs_no_task_for_its_tokens(
    served: Served, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Chunked or, for HTTP/1.0, ended by the connection's end; the tokens go by the tap."""
    tapped: list[bytes] = []
    put = sse.Wire.put

    def recording(wire: sse.Wire, item: Any) -> None:
        tapped.append(item.output.outputs[0].text)
        put(wire, item)

    monkeypatch.setattr(sse.Wire, "put", recording)
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    change = {"prompt": "hello", "stream": True, "max_tokens": 20, "temperature": 0}
    body = json.dumps(long_body(PATHS[0], **change)).encode()
    head = f"POST {PATHS[0]} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    answer = await reader.read()
    writer.close()
    header, _, sent = answer.partition(b"\r\n\r\n")
    is_chunked = b"Transfer-Encoding: chunked" in header
    assert is_chunked == (version == "1.1")
    text = (b"".join(chunks_of(sent)) if is_chunked else sent).decode()
    items = frames(text)
    assert items.pop() == "[DONE]"
    texts = [item["choices"][0]["text"] for item in items]
    assert "".join(texts) == expected_text(list(b"hello"), 20)
    assert len(tapped) == 18, "all but the first, which comes with the head, and the last"
    assert texts[1:-1] == tapped


def chunks_of(body: bytes) -> Iterator[bytes]:
    """Undoes chunked encoding, and fails where it is wrong."""
    while True:
        size, _, body = body.partition(b"\r\n")
        chunk, body = body[: int(size, 16)], body[int(size, 16) :]
        assert body[:2] == b"\r\n"
        if not chunk:
            return
        yield chunk
        body = body[2:]


async def test_a_slow_reader_holds_up_nobody(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsent: list[int] = []
    put = sse.Wire.put

    def recording(wire: sse.Wire, item: Any) -> None:
        assert wire._transport is not None
        unsent.append(wire._transport.get_write_buffer_size())
        put(wire, item)

    monkeypatch.setattr(sse.Wire, "put", recording)
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connection, limit=256)
    body = json.dumps(long_body(PATHS[0], stream=True, n=120, logprobs=20)).encode()
    head = f"POST {PATHS[0]} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await until(lambda: len(served.core.added) == 120)
    await until(lambda: not served.core.open)  # the engine ran on while nobody read
    await served.still_works()
    received = b""
    while b"[DONE]" not in received[-100:]:
        received += await reader.read(65536)
    assert received.count(b'"finish_reason":"length"') == 120
    assert not any(unsent), "what the connection does not take has to collect as one output"
    assert len(unsent) < 95, "of 99 outputs before the last"
    writer.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_a_full_queue_is_429(served: Served, path: str, *, stream: bool) -> None:
    served.core.rejects_as = "queue_full"
    url, body = served.url + path, long_body(path, stream=stream)
    async with served.http.post(url, json=body) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        check_envelope(429, await response.json(), "TooManyRequestsError")
    served.core.rejects_as = None
    await served.still_works()


@pytest.mark.parametrize("path", PATHS)
async def test_a_dead_engine_is_503(served: Served, path: str) -> None:
    served.core.step_s = 0.05
    whole = asyncio.create_task(served.post(path, long_body(path)))
    stream = asyncio.create_task(served.post(path, long_body(path, stream=True)))
    await until(lambda: len(served.core.open) == 2)
    await asyncio.sleep(0.12)  # the stream has begun
    served.core.die()
    status, answer = await whole
    assert status == 503
    check_envelope(503, answer, "ServiceUnavailableError")
    status, chunks = await stream
    assert status == 200
    check_envelope(503, chunks[-1], "ServiceUnavailableError")
    for later in (False, True):
        status, answer = await served.post(path, long_body(path, stream=later))
        assert status == 503
    assert (await served.get("/health"))[0] == 503
    assert (await served.get("/ready"))[0] == 503


@pytest.mark.parametrize("path", PATHS)
async def test_a_sequence_that_breaks_is_an_error(served: Served, path: str) -> None:
    served.core.breaks_after = 3
    status, answer = await served.post(path, long_body(path))
    assert status == 500
    check_envelope(500, answer, "InternalServerError")
    status, chunks = await served.post(path, long_body(path, stream=True))
    assert status == 200
    check_envelope(500, chunks[-1], "InternalServerError")
    assert "[DONE]" not in chunks
    served.core.breaks_after = 0  # at the first step: nothing was sent yet
    status, _ = await served.post(path, long_body(path, stream=True))
    assert status == 500
    served.core.breaks_after = None
    await served.still_works()


async def test_the_official_client_sees_an_error_in_a_stream(served: Served) -> None:
    served.core.breaks_after = 3
    stream = await served.openai.completions.create(
        model=MODEL, prompt="hi", max_tokens=50, stream=True
    )
    with pytest.raises(openai.APIError, match="not finite"):
        async for _ in stream:
            pass


async def test_a_stalled_engine_is_not_healthy(serve: Serve) -> None:
    served = await serve(engine_stall_timeout=0.2)
    assert (await served.get("/health"))[0] == 200
    await asyncio.sleep(0.3)
    assert (await served.get("/health"))[0] == 200  # idle is not stalled
    served.core.is_frozen = True
    task = asyncio.create_task(served.post(PATHS[0], long_body(PATHS[0])))
    await until(lambda: served.core.open)
    assert (await served.get("/health"))[0] == 200
    await asyncio.sleep(0.3)
    status, text = await served.get("/health")
    assert status == 503
    assert "no step" in text
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_before_the_engine_is_there(served: Served) -> None:
    """The server answers while the engine loads."""
    state = ServerState(ServerConfig(port=0))
    state.phase = "compile 3/9"
    runner = make_runner(create_app_around(state))
    await runner.setup()
    try:
        from aiohttp import web

        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = "http://127.0.0.1:{1}".format(*runner.addresses[0])
        for path, expected in (("/health", 200), ("/ready", 503), ("/metrics", 200)):
            async with served.http.get(url + path) as response:
                assert response.status == expected
        async with served.http.get(f"{url}/ready") as response:
            error = check_envelope(503, await response.json(), "ServiceUnavailableError")
            assert "compile 3/9" in error["message"]
        for path, good in GOOD.items():
            async with served.http.post(url + path, json=good) as response:
                assert response.status == 503
                assert "Retry-After" in response.headers
        state.attach(served.engine)
        async with served.http.get(f"{url}/ready") as response:
            assert response.status == 200
    finally:
        await runner.cleanup()


async def test_closing_the_engine_ends_streams_with_an_error(served: Served) -> None:
    served.core.step_s = 0.05
    task = asyncio.create_task(served.post(PATHS[0], long_body(PATHS[0], stream=True)))
    await until(lambda: served.core.open)
    await asyncio.sleep(0.12)
    await served.engine.close()
    _, chunks = await task
    check_envelope(503, chunks[-1], "ServiceUnavailableError")


async def test_many_at_once(served: Served) -> None:
    """Mixed good, bad and leaving clients: all get their own answer, nothing is left."""

    async def one(number: int) -> int:
        path = PATHS[number % 2]
        body = long_body(path, max_tokens=20, stream=number % 3 == 0)
        if number % 7 == 0:
            body["temperature"] = 9
        if number % 5 == 0:
            task = asyncio.create_task(served.post(path, body))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return 0
        status, _ = await served.post(path, body)
        return status

    statuses = await asyncio.gather(*(one(number) for number in range(70)))
    expected = [0 if n % 5 == 0 else 400 if n % 7 == 0 else 200 for n in range(70)]
    assert statuses == expected
    await until(lambda: served.state.num_inflight == 0)
    await served.still_works()
