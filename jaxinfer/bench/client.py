"""One request to an OpenAI-style server, streamed, with the time at which each piece came.

While a stream runs, pieces of bytes are only stamped and kept; frames and JSON are taken apart when
it has ended, so that the client's own work delays other streams as little as can be. Knows the API
of a completion; not who sends requests when, and nothing of jaxinfer's server.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import aiohttp
import msgspec

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
ENDPOINTS: tuple[Endpoint, ...] = ("/v1/completions", "/v1/chat/completions")

_MAX_ERROR_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one request asks for. Chat takes a text; completions take a text or token ids."""

    content: str | list[int]
    output_len: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go, and what is the same in all of them."""

    base_url: str  # without /v1
    endpoint: Endpoint
    model: str
    api_key: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    request_timeout_s: float = 600.0

    def at(self, base_url: str) -> "Target":
        return replace(self, base_url=base_url)

    def of(self, model: str) -> "Target":
        return replace(self, model=model)

    @property
    def url(self) -> str:
        return self.base_url + self.endpoint

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def body(self, prompt: Prompt) -> bytes:
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": prompt.output_len,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "/v1/chat/completions":
            fields["messages"] = [{"role": "user", "content": prompt.content}]
        else:
            fields["prompt"] = prompt.content
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields)


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the client saw it. Times are of `time.perf_counter`, in seconds.

    `token_times_s` has one entry for each frame that brought text, which is each token with a
    server that sends them singly. A failed request has an `error` and counts in no figure.
    """

    planned_s: float  # when it should have been sent
    sent_s: float
    end_s: float
    token_times_s: list[float]
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    is_counted: bool = False  # the server said how many tokens there were; else frames count
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None when there is but one, or one frame."""
        if self.num_output_tokens < 2 or len(self.token_times_s) < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.num_output_tokens - 1)


class Piece(NamedTuple):
    """What one read from the socket brought."""

    time_s: float
    data: bytes


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def has_text(self) -> bool:
        if self.delta is None:
            return bool(self.text)
        return bool(self.delta.content or self.delta.reasoning or self.delta.reasoning_content)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Frame(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class Stream(NamedTuple):
    """A stream taken apart."""

    token_times_s: list[float]
    usage: _Usage | None
    error: str | None


_decoder = msgspec.json.Decoder(_Frame)


def parse_stream(pieces: list[Piece]) -> Stream:
    """The frames in `pieces`; each has the time of the piece that brought its last byte.

    Events are separated as the standard for server-sent events says (HTML, 9.2), except that one
    `data:` line must hold a whole frame, as with every OpenAI-style server.
    """
    times: list[float] = []
    first_s: float | None = None
    usage: _Usage | None = None
    is_done = False
    rest = b""
    for time_s, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                is_done = True
                continue
            try:
                frame = _decoder.decode(payload)
            except msgspec.MsgspecError as error:
                return Stream(times, usage, f"a frame is not what the API says: {error}")
            if frame.error is not None:
                return Stream(times, usage, f"error in the stream: {_message_of(frame.error)}")
            usage = frame.usage or usage
            if frame.choices and first_s is None:
                first_s = time_s
            if any(choice.has_text for choice in frame.choices):
                times.append(time_s)
    if not is_done:
        return Stream(times, usage, "the stream ended without [DONE]")
    if not times and first_s is not None:
        times.append(first_s)  # all of its tokens have no text: special ones, or half a character
    return Stream(times, usage, None if times else "the stream had no choices")


def _message_of(error: Any) -> str:
    text = error.get("message") if isinstance(error, dict) else error
    return str(text)[:_MAX_ERROR_CHARS]


def _refusal(status: int, body: bytes) -> str:
    """A status and what the server said, short enough to be counted by."""
    try:
        content = msgspec.json.decode(body)
        text = _message_of(content.get("error") or content.get("message") or content)
    except (msgspec.MsgspecError, AttributeError):
        text = body[:_MAX_ERROR_CHARS].decode(errors="replace")
    return f"HTTP {status}: {text}"


async def exchange(
    session: aiohttp.ClientSession, target: Target, prompt: Prompt, *, planned_s: float
) -> Exchange:
    """Sends a request and reads the whole answer. Does not raise: failures are in the result."""
    body, headers = target.body(prompt), target.headers
    pieces: list[Piece] = []
    error: str | None = None
    sent_s = time.perf_counter()
    try:
        async with (
            asyncio.timeout(target.request_timeout_s),
            session.post(target.url, data=body, headers=headers) as response,
        ):
            async for data in response.content.iter_any():
                pieces.append(Piece(time.perf_counter(), data))
            if response.status != 200:
                error = _refusal(response.status, b"".join(data for _, data in pieces))
    except TimeoutError:
        error = f"no complete answer within {target.request_timeout_s:g} s"
    except (aiohttp.ClientError, OSError) as failure:
        error = f"{type(failure).__name__}: {failure}"[:_MAX_ERROR_CHARS]
    end_s = time.perf_counter()
    stream = parse_stream(pieces) if error is None else Stream([], None, error)
    usage = stream.usage
    return Exchange(
        planned_s=planned_s,
        sent_s=sent_s,
        end_s=end_s,
        token_times_s=stream.token_times_s,
        num_prompt_tokens=usage.prompt_tokens if usage else 0,
        num_output_tokens=usage.completion_tokens if usage else len(stream.token_times_s),
        is_counted=usage is not None,
        error=stream.error,
    )


def open_session() -> aiohttp.ClientSession:
    """A session without limits of its own: how many requests are open is for the caller to say.

    Connections that have been idle for long are not used again, because the server may be closing
    them at that moment (uvicorn does after 5 s).
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)
    return aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**20
    )
