"""Streams: the shape of their frames, and that they say what the whole answer says."""

import json
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest

from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.e2e.api import CHAT, COMPLETIONS, Api
from tests.e2e.test_conformance_completions import check_offsets

EMOJI = "🙂🙃"
ASK = [{"role": "user", "content": "Tell me a story."}]

SAME_FOR_BOTH: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"seed": 3, "n": 2},
    "hot": {"seed": 4, "temperature": 2, "skip_special_tokens": False},
    "truncated": {"seed": 5, "top_k": 7, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"seed": 6, "frequency_penalty": 1, "presence_penalty": 1},
    "repetition": {"seed": 6, "repetition_penalty": 1.5, "logit_bias": {"70": 3}},
    "stop": {"temperature": 0, "stop": ["e", "o", "th", "zz"]},
    "stop in output": {
        "temperature": 0,
        "stop": ["e", "o", "th"],
        "include_stop_str_in_output": True,
    },
    "stop ids": {"seed": 1, "stop_token_ids": list(range(60, 120)), "min_tokens": 3},
    "allowed": {"seed": 1, "allowed_token_ids": [70, 71, 72], "bad_words": ["ab"]},
    "ends": {"seed": 1, "ignore_eos": False, "logit_bias": {"342": 6}},
}


@pytest.mark.parametrize("name", SAME_FOR_BOTH)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_stream_equals_whole(api: Api, path: str, name: str) -> None:
    body = {
        **({"prompt": "Once upon"} if path == COMPLETIONS else {"messages": ASK}),
        "max_tokens": 24,
        "ignore_eos": True,
        "return_token_ids": True,
        **SAME_FOR_BOTH[name],
    }
    whole = api.whole(path, **body)
    streamed = api.stream(path, **body, stream_options={"include_usage": True})
    assert [(choice.text, choice.token_ids) for choice in streamed.choices] == [
        (choice.text, choice.token_ids) for choice in whole.choices
    ]
    for ours, theirs in zip(streamed.choices, whole.choices, strict=True):
        assert ours.finish_reason == theirs.finish_reason
        assert ours.stop_reason == theirs.stop_reason
    assert streamed.choices[0].prompt_token_ids == whole.choices[0].prompt_token_ids
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert streamed.usage[name] == whole.usage[name]
    # The plain form of the stream, whose frames are made another way, too.
    del body["return_token_ids"]
    plain = api.stream(path, **body)
    assert [choice.text for choice in plain.choices] == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_of_completions(api: Api, *, echo: bool) -> None:
    body = {"prompt": "日本語 fox 🙂", "max_tokens": 20, "logprobs": 3, "echo": echo, "seed": 2}
    whole, streamed = api.whole(COMPLETIONS, **body).only, api.stream(COMPLETIONS, **body).only
    assert streamed.text == whole.text
    assert streamed.logprobs == whole.logprobs
    check_offsets(whole.text, whole.logprobs)


def test_logprobs_of_chat(api: Api) -> None:
    body = {"messages": ASK, "max_tokens": 20, "logprobs": True, "top_logprobs": 4, "seed": 2}
    body |= {"return_token_ids": True, "ignore_eos": True}
    whole, streamed = api.whole(CHAT, **body).only, api.stream(CHAT, **body).only
    assert streamed.logprobs == whole.logprobs
    assert len(whole.logprobs["content"]) == len(whole.token_ids)


def test_several_prompts(api: Api) -> None:
    body = {"prompt": ["One fox", "Two dogs"], "n": 2, "max_tokens": 6, "seed": 1, "echo": True}
    whole, streamed = api.whole(COMPLETIONS, **body), api.stream(COMPLETIONS, **body)
    assert [choice.text for choice in streamed.choices] == [choice.text for choice in whole.choices]
    assert len(whole.choices) == 4


# Frames.


def test_frames_of_chat(api: Api) -> None:
    body = {"messages": ASK, "max_tokens": 5, "ignore_eos": True, "model": "alias"}
    frames = api.stream(CHAT, **body).frames
    assert {frame["object"] for frame in frames} == {"chat.completion.chunk"}
    assert {frame["model"] for frame in frames} == {"alias"}
    assert frames[0]["id"].startswith("chatcmpl-")
    assert frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("usage" not in frame for frame in frames)
    assert [frame["choices"][0]["finish_reason"] for frame in frames[:-1]] == (
        [None] * (len(frames) - 1)
    )
    assert frames[-1]["choices"][0]["finish_reason"] == "length"


def test_usage_frame(api: Api) -> None:
    for path, start in ((COMPLETIONS, {"prompt": "Once"}), (CHAT, {"messages": ASK})):
        body = {**start, "max_tokens": 5, "ignore_eos": True}
        frames = api.stream(path, **body, stream_options={"include_usage": True}).frames
        assert all(frame["usage"] is None for frame in frames[:-1])
        assert frames[-1]["choices"] == []
        assert frames[-1]["usage"]["completion_tokens"] == 5


def test_continuous_usage(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "Once", "max_tokens": 6, "ignore_eos": True, "stream_options": options}
    frames = api.stream(COMPLETIONS, **body).frames
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert all(
        usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        for usage in (frame["usage"] for frame in frames)
    )


def test_headers(api: Api) -> None:
    response = api.request("POST", COMPLETIONS, {"prompt": "x", "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    assert "content-encoding" not in response.headers


def test_frames_come_one_by_one(api: Api) -> None:
    """The first bytes are there long before the last token."""
    body = {"prompt": "x", "stream": True, "max_tokens": 200, "ignore_eos": True}
    with closing(api.connect()) as connection:
        connection.request(
            "POST", COMPLETIONS, json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        sizes = []
        while data := response.read1():
            sizes.append(len(data))
    assert len(sizes) > 2  # not more: frames that a busy client has not fetched are merged
    assert max(sizes) < sum(sizes) / 4


def test_characters_are_never_split(api: Api, tokenizer: Tokenizer) -> None:
    """Tokens that spell emoji in parts: no delta ends within one."""
    allowed = sorted(set(tokenizer.encode(EMOJI)))
    assert len(allowed) == 3
    body = {
        "prompt": "x",
        "allowed_token_ids": allowed,
        "max_tokens": 120,
        "seed": 5,
        "return_token_ids": True,
    }
    answer = api.stream(COMPLETIONS, **body)
    assert answer.only.text == tokenizer.decode(answer.only.token_ids)
    assert any(emoji in answer.only.text for emoji in EMOJI)
    # Where the tokens spell a whole character, it arrives whole.
    deltas = [frame["choices"][0]["text"] for frame in answer.frames]
    ids = [frame["choices"][0]["token_ids"] for frame in answer.frames]
    first, *seconds = tokenizer.encode(EMOJI[0])[:1] + [tokenizer.encode(e)[1] for e in EMOJI]
    for before, after in pairwise(range(len(ids))):
        if ids[before] == [first] and ids[after] and ids[after][0] in seconds:
            assert deltas[before] in ("", "\ufffd")
            assert deltas[after][0] in EMOJI


def test_official_client_streams(api: Api) -> None:
    stream = api.openai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_completion_tokens=10,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10
    whole = api.openai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_completion_tokens=10,
        seed=1,
        extra_body={"ignore_eos": True},
    )
    assert whole.choices[0].message.content == text
