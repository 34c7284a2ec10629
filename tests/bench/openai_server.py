"""A small OpenAI-style server whose answers are known, for the tests of the client.

It speaks the protocol by hand and not through jaxinfer's server: the client must work with any.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass(kw_only=True)
class KnownServer:
    """Streams `tokens` frames, the first after `ttft_s`, the others `gap_s` apart."""

    tokens: int = 4
    ttft_s: float = 0.0
    gap_s: float = 0.0
    fault: str = ""  # "busy", "error frame", "cut", "hang", "no usage", "not json"
    fault_every: int = 1  # only each n-th request has the fault
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "known"}, {"id": "other"}]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            return await self._answer(request, len(self.bodies))
        finally:
            self._now -= 1

    async def _answer(self, request: web.Request, number: int) -> web.StreamResponse:
        fault = self.fault if number % self.fault_every == 0 else ""
        if fault == "busy":
            return web.json_response({"error": {"message": "queue full"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_chat = "chat" in request.path
        await asyncio.sleep(self.ttft_s)
        if is_chat:
            await response.write(_frame({"delta": {"role": "assistant", "content": ""}}))
        for index in range(self.tokens):
            if index:
                await asyncio.sleep(self.gap_s)
            if fault == "hang":
                await asyncio.sleep(60)
            if fault and index == 2:
                break
            text = f"t{index} "
            await response.write(
                _frame({"delta": {"content": text}} if is_chat else {"text": text})
            )
        if fault == "cut":
            return response
        if fault == "error frame":
            await response.write(b'data: {"error": {"message": "out of memory"}}\n\n')
            return response
        if fault == "not json":
            await response.write(b"data: {nonsense\n\n")
        if fault != "no usage":
            usage = {"prompt_tokens": 7, "completion_tokens": self.tokens}
            await response.write(_frame(None, usage=usage))
        await response.write(b": a comment\n\ndata: [DONE]\n\n")
        return response


def _frame(choice: dict[str, Any] | None, **more: Any) -> bytes:
    choices = [] if choice is None else [{"index": 0, "finish_reason": None, **choice}]
    return b"data: " + json.dumps({"id": "x", "choices": choices, **more}).encode() + b"\n\n"


@asynccontextmanager
async def running(server: KnownServer) -> AsyncIterator[KnownServer]:
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
