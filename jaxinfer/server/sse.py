"""Server-sent events: how a stream begins, goes on, fails and ends.

Nothing is sent before the first output, so whatever is refused is refused with its own status;
after that an error is a `data: {"error": ...}` frame and the end, without `[DONE]`.
Knows frames and connections; not what is in the frames.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from aiohttp import HttpVersion11, web

from jaxinfer.errors import JaxInferError
from jaxinfer.logging import get_logger
from jaxinfer.server.errors import ApiError, api_error
from jaxinfer.server.generation import PromptOutput

logger = get_logger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies must not hold frames back
}
_encoder = msgspec.json.Encoder()


class Frames(Protocol):
    """Turns outputs into frames, in order."""

    def begin(self) -> bytes: ...

    def frames(self, item: PromptOutput) -> bytes:
        """May be empty. Raises ApiError for an output that is a failure."""
        ...

    def end(self) -> bytes: ...


def frame(value: Any) -> bytes:
    return b"data: " + _encoder.encode(value) + b"\n\n"


def text_json(text: str) -> bytes:
    return _encoder.encode(text)


class TextFrames:
    """Frames that differ in a text only: all else is encoded once per choice.

    `example` must be the JSON of a frame whose text is `PLACEHOLDER`.
    """

    PLACEHOLDER = "\ue000text\ue000"  # private use: in no name that a client or model can have

    def __init__(self, example: Any) -> None:
        self._head, _, self._tail = frame(example).partition(text_json(self.PLACEHOLDER))

    def frame(self, text: str) -> bytes:
        return b"".join((self._head, _encoder.encode(text), self._tail))


class Wire:
    """One stream: sends outputs as they come.

    It is a tap, too: as long as the connection takes all that is written, frames go there without
    the request's task being woken for them. A client that does not keep up is the task's, which
    waits for it.
    """

    def __init__(self, request: web.Request, frames: Frames, headers: dict[str, str]) -> None:
        self._request = request
        self._frames = frames
        self._response = web.StreamResponse(headers={**_HEADERS, **headers})
        self._transport: asyncio.WriteTransport | None = None  # once the head is sent
        self._is_chunked = request.version >= HttpVersion11

    def is_open(self) -> bool:
        transport = self._transport
        return (
            transport is not None
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        )

    def put(self, item: PromptOutput) -> None:
        assert self._transport is not None, "it is open"
        frames = self._frames.frames(item)
        if frames:
            self._transport.write(
                b"%x\r\n%b\r\n" % (len(frames), frames) if self._is_chunked else frames
            )

    async def send(self, outputs: AsyncGenerator[PromptOutput, None]) -> web.StreamResponse:
        """`outputs` has this tap. Closing, by error or by the client, closes it."""
        frames, response = self._frames, self._response
        async with aclosing(outputs):
            first = await anext(outputs)
            pending = frames.begin() + frames.frames(first)
            if self._is_chunked:
                response.enable_chunked_encoding()
            await response.prepare(self._request)
            await response.write(pending)
            self._transport = self._request.transport
            try:
                async for item in outputs:
                    pending = frames.frames(item)
                    if pending:
                        await response.write(pending)
                last = frames.end()
            except JaxInferError as error:
                last = frame(api_error(error).envelope())
            except ConnectionError:
                raise
            except Exception:
                # The status is sent: the client must learn of it here, the log must have the cause.
                logger.exception("a stream broke")
                last = frame(ApiError(500, "Internal error.").envelope())
            await response.write_eof(last)  # one write for the last frame and the end
            return response
