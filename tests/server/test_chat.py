"""Chat completions through the official client and as raw frames."""

from typing import Any

import pytest

from jaxinfer.server.sse import TextFrames
from tests.server.conftest import MODEL, Serve, Served
from tests.server.fake_core import expected_text

HELLO: Any = [{"role": "user", "content": "hello"}]
RENDERED = list(b"<user>hello<assistant>")


async def test_answer(served: Served) -> None:
    answer: Any = await served.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=8, temperature=0
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.system_fingerprint.startswith("jaxinfer-")
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected_text(RENDERED, 8)
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(RENDERED)
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == len(RENDERED) + 8
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_stream_is_the_answer_in_pieces(served: Served) -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, chunks = await served.post("/v1/chat/completions", body)
    assert status == 200
    assert chunks.pop() == "[DONE]"
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == expected_text(RENDERED, 8)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_stream_with_the_official_client(served: Served) -> None:
    stream: Any = await served.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, n=3, seed=4, stream=True, logprobs=True
    )
    texts = ["", "", ""]
    tokens: list[list[str]] = [[], [], []]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs:
                tokens[choice.index] += [item.token for item in choice.logprobs.content]
    assert texts == [expected_text(RENDERED, 6, seed=4 + index) for index in range(3)]
    assert ["".join(items) for items in tokens] == texts


async def test_continuous_usage(served: Served) -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    _, chunks = await served.post("/v1/chat/completions", body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 4


async def test_logprobs(served: Served) -> None:
    answer: Any = await served.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(item.token for item in content) == answer.choices[0].message.content
    assert content[0].logprob == -1.0
    assert bytes(content[0].bytes).decode() == content[0].token
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.0, -1.5]
    assert content[0].top_logprobs[1].token == content[0].token


async def test_logprobs_without_top(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 1, "logprobs": True}
    _, answer = await served.post("/v1/chat/completions", body)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_prompt_logprobs_and_token_ids(served: Served) -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 2,
        "temperature": 0,
        "prompt_logprobs": 1,
        "return_token_ids": True,
        "logprobs": True,
        "return_tokens_as_token_ids": True,
    }
    _, answer = await served.post("/v1/chat/completions", body)
    assert answer["prompt_token_ids"] == RENDERED
    ids = answer["choices"][0]["token_ids"]
    assert bytes(ids).decode() == expected_text(RENDERED, 2)
    tokens = [item["token"] for item in answer["choices"][0]["logprobs"]["content"]]
    assert tokens == [f"token_id:{token_id}" for token_id in ids]
    prompt = answer["prompt_logprobs"]
    assert prompt[0] is None
    assert len(prompt) == len(RENDERED)
    assert set(prompt[1]) == {str(RENDERED[1]), str(ord("z"))}
    assert prompt[1][str(RENDERED[1])]["rank"] == 2


async def test_stream_of_token_ids(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "return_token_ids": True, "stream": True}
    _, chunks = await served.post("/v1/chat/completions", body)
    assert chunks[0]["prompt_token_ids"] == RENDERED
    ids = [i for chunk in chunks[1:-1] for i in chunk["choices"][0]["token_ids"]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert bytes(ids).decode() == text


async def test_stop_string(served: Served) -> None:
    whole = expected_text(RENDERED, 20)
    stop = whole[9:11]
    for stream in (False, True):
        body = {"messages": HELLO, "temperature": 0, "stop": stop, "stream": stream}
        _, answer = await served.post("/v1/chat/completions", body)
        if stream:
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in answer[:-1])
            last = answer[-2]["choices"][0]
        else:
            last = answer["choices"][0]
            text = last["message"]["content"]
        assert text == whole[: whole.index(stop)]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)


async def test_parts_roles_and_names(served: Served) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    status, answer = await served.post("/v1/chat/completions", {"messages": messages})
    assert status == 400
    assert answer["error"]["param"] == "messages[2].content"
    body = {"messages": messages[:2], "max_tokens": 1, "return_token_ids": True}
    _, answer = await served.post("/v1/chat/completions", body)
    assert bytes(answer["prompt_token_ids"]) == b"<system>be kind<user>hi<assistant>"


async def test_continue_final_message_and_echo(served: Served) -> None:
    body = {
        "messages": [*HELLO, {"role": "assistant", "content": "Well, "}],
        "continue_final_message": True,
        "echo": True,
        "max_tokens": 3,
        "temperature": 0,
        "return_token_ids": True,
    }
    _, answer = await served.post("/v1/chat/completions", body)
    prompt = answer["prompt_token_ids"]
    assert bytes(prompt).endswith(b"Well, ")
    expected = "Well, " + expected_text(prompt, 3)
    assert answer["choices"][0]["message"]["content"] == expected
    _, chunks = await served.post("/v1/chat/completions", {**body, "stream": True})
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == expected


async def test_max_tokens_defaults_to_what_is_left(serve: Serve) -> None:
    served = await serve(defaults={"max_new_tokens": 5, "temperature": 0.0})
    _, answer = await served.post("/v1/chat/completions", {"messages": HELLO})
    assert answer["choices"][0]["message"]["content"] == expected_text(RENDERED, 5)
    assert served.core.added[-1].sampling.is_greedy
    long = [{"role": "user", "content": "x" * 107}]  # leaves 4 tokens of 128
    status, answer = await served.post("/v1/chat/completions", {"messages": long})
    assert status == 200, answer
    assert answer["usage"]["total_tokens"] == 128


async def test_both_limits_given_names_the_one_without_effect(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 9, "max_completion_tokens": 2}
    async with served.http.post(f"{served.url}/v1/chat/completions", json=body) as response:
        assert response.headers["x-jaxinfer-ignored"] == "max_tokens"
        assert (await response.json())["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("text", ["", 'quote " and \\', "emoji 😀", "\x00 \u2028", "ümlaut"])
def test_prepared_frames_equal_encoded_ones(text: str) -> None:
    from jaxinfer.server.sse import frame

    def chunk(content: str) -> dict:
        return {"id": "a", "choices": [{"delta": {"content": content}, "logprobs": None}]}

    assert TextFrames(chunk(TextFrames.PLACEHOLDER)).frame(text) == frame(chunk(text))
