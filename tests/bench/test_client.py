"""The client of `bench serve`: what it sends, when it says tokens came, how it sees failures."""

import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.bench.client import (
    Endpoint,
    Exchange,
    Piece,
    Prompt,
    Target,
    exchange,
    open_session,
    parse_stream,
)
from tests.bench.openai_server import KnownServer, running

STREAM = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"a \\u00e9\\n"}}]}\r\n\r\n'
    b": keep-alive\n\n"
    b'data:{"choices":[{"index":0,"delta":{"reasoning_content":"hm"}}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\n'
    b"data: [DONE]\n\n"
)


def ask(server: KnownServer, prompt: Prompt, **fields) -> Exchange:
    """One request to the server."""

    async def run() -> Exchange:
        async with running(server), open_session() as session:
            common = {"base_url": server.url, "endpoint": "/v1/completions", "model": "known"}
            target = Target(**{**common, **fields})
            return await exchange(session, target, prompt, planned_s=time.perf_counter())

    return asyncio.run(run())


@given(st.lists(st.integers(1, len(STREAM) - 1), unique=True))
def test_a_stream_may_be_cut_anywhere(cuts: list[int]):
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [
        Piece(float(end), STREAM[begin:end]) for begin, end in zip(edges, edges[1:], strict=False)
    ]
    times, usage, error = parse_stream(pieces)
    assert error is None
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 3)
    # A frame came when the piece with the end of its line did: not before, not with the next.
    ends = [STREAM.index(b"\n", STREAM.index(mark)) + 1 for mark in (b"a \\u00e9", b"hm")]
    assert times == [min(float(edge) for edge in edges if edge >= end) for end in ends]


@pytest.mark.parametrize(
    ("stream", "problem"),
    [
        (b'data: {"choices":[{"text":"a"}]}\n\n', "without [DONE]"),
        (b'data: {"error":{"message":"no memory"}}\n\ndata: [DONE]\n\n', "no memory"),
        (b'data: {"error":"plain"}\n\n', "plain"),
        (b"data: {oops\n\ndata: [DONE]\n\n", "not what the API says"),
        (b'data: {"choices":7}\n\ndata: [DONE]\n\n', "not what the API says"),
        (b"data: [DONE]\n\n", "no choices"),
        (b"", "without [DONE]"),
    ],
)
def test_a_broken_stream_is_a_failure(stream: bytes, problem: str):
    error = parse_stream([Piece(1.0, stream)]).error
    assert error is not None
    assert problem in error


def test_tokens_without_text_still_have_a_first_time():
    frames = b'data: {"choices":[{"text":""}]}\n\n'
    stream = parse_stream([Piece(1.0, frames), Piece(2.0, frames), Piece(3.0, b"data: [DONE]\n")])
    assert (stream.token_times_s, stream.error) == ([1.0], None)


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_times_are_those_of_the_server(endpoint: Endpoint):
    """The server waits 0.1 s and then 0.04 s a token; load can only make it longer."""
    server = KnownServer(tokens=5, ttft_s=0.1, gap_s=0.04)
    seen = ask(server, Prompt(content="hi", output_len=5), endpoint=endpoint)
    assert seen.error is None
    assert (seen.num_prompt_tokens, seen.num_output_tokens, seen.is_counted) == (7, 5, True)
    assert len(seen.token_times_s) == 5
    assert seen.ttft_s >= 0.1
    assert seen.tpot_s is not None
    assert seen.tpot_s >= 0.039
    assert seen.e2e_s >= seen.ttft_s + 4 * seen.tpot_s


def test_what_is_sent():
    server = KnownServer()
    target = {"ignore_eos": True, "temperature": 0.5, "api_key": "secret"}
    ask(server, Prompt(content=[5, 6], output_len=9), **target)
    ask(server, Prompt(content="hi", output_len=2), endpoint="/v1/chat/completions")
    ids, chat = server.bodies
    assert ids["prompt"] == [5, 6]
    assert (ids["max_tokens"], ids["ignore_eos"], ids["temperature"]) == (9, True, 0.5)
    assert ids["stream_options"] == {"include_usage": True}
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert chat["messages"] == [{"role": "user", "content": "hi"}]
    assert "ignore_eos" not in chat, "OpenAI's own API refuses fields it does not know"
    assert "Authorization" not in server.headers[1]


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("busy", "HTTP 429: queue full"),
        ("error frame", "out of memory"),
        ("cut", "without [DONE]"),
        ("not json", "not what the API says"),
    ],
)
def test_a_failure_says_its_cause(fault: str, problem: str):
    seen = ask(KnownServer(fault=fault), Prompt(content="hi", output_len=4))
    assert seen.error is not None
    assert problem in seen.error


def test_without_usage_frames_count():
    seen = ask(KnownServer(fault="no usage", tokens=6), Prompt(content="hi", output_len=6))
    assert seen.error is None
    assert (seen.num_output_tokens, seen.is_counted) == (2, False)


def test_a_server_that_hangs_is_given_up():
    server = KnownServer(fault="hang")
    seen = ask(server, Prompt(content="hi", output_len=4), request_timeout_s=0.2)
    assert seen.error == "no complete answer within 0.2 s"


def test_no_server():
    async def run() -> Exchange:
        async with open_session() as session:
            target = Target(base_url="http://127.0.0.1:1", endpoint="/v1/completions", model="m")
            return await exchange(session, target, Prompt(content="a", output_len=1), planned_s=0.0)

    error = asyncio.run(run()).error
    assert error is not None
    assert "ClientConnectorError" in error


def test_bodies_are_json():
    target = Target(base_url="", endpoint="/v1/completions", model="mö")
    assert json.loads(target.body(Prompt(content='a "b"', output_len=1)))["model"] == "mö"
