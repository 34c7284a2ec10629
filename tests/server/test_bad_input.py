"""Everything a client can get wrong: status, field, message; streamed and not; and life goes on."""

from typing import Any

import openai
import pytest

from tests.server.conftest import MODEL, Serve, Served

USER: Any = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}

# change to a good body -> field named, words of the message
COMMON: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1}, "temperature", "[0, 2]"),
    ({"temperature": 3}, "temperature", "got 3"),
    ({"temperature": "hot"}, "temperature", 'must be a number, got "hot"'),
    ({"top_p": 0}, "top_p", "(0, 1]"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"min_p": 2}, "min_p", "[0, 1]"),
    ({"presence_penalty": 5}, "presence_penalty", "5"),
    ({"frequency_penalty": -5}, "frequency_penalty", "-5"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"n": 100_000}, "n", "100000"),
    ({"n": 1.5}, "n", "must be an integer, got 1.5"),
    ({"n": True}, "n", "must be an integer, got true"),
    ({"max_tokens": -1}, "max_tokens", "-1"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 129}, "max_tokens", "128"),
    ({"max_tokens": "many"}, "max_tokens", "an integer"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "max_tokens=3"),
    ({"seed": 2**63}, "seed", str(2**63)),
    ({"seed": 10**40}, "seed", "between"),
    ({"stop": ""}, "stop", "non-empty"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": ["a", 1]}, "stop[1]", "must be a string, got 1"),
    ({"stop_token_ids": [260]}, "stop_token_ids", "outside the vocabulary (0 to 259)"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
    ({"logit_bias": {"260": 1}}, "logit_bias", "260"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias[1]", "101"),
    ({"logit_bias": {"1": "much"}}, "logit_bias[...]", "must be a number"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "empty"),
    ({"allowed_token_ids": [999_999]}, "allowed_token_ids", "999999"),
    ({"bad_words": [1]}, "bad_words[0]", "a string"),
    ({"truncate_prompt_tokens": 1000}, "truncate_prompt_tokens", "1000"),
    ({"priority": 2**40}, "priority", "between"),
    ({"priority": 2}, "priority", "--scheduling-policy priority"),
    ({"cache_salt": ""}, "cache_salt", "1 to 128"),
    ({"cache_salt": "x" * 129}, "cache_salt", "129"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": []}, "stream_options", "an object"),
    ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "not supported"),
    ({"response_format": "banana"}, "response_format", "banana"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "not supported"),
    ({"guided_choice": ["a"]}, "guided_choice", "not supported"),
    ({"best_of": 3}, "best_of", "must equal n=1"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"truncation_side": "right"}, "truncation_side", "not supported"),
]
COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", 1]}, "prompt", "mixture"),
    ({"prompt": ["a"] * 1025}, "prompt", "at most 1024"),
    ({"prompt": [1, 260]}, "prompt", "token id 260"),
    ({"prompt": [-1]}, "prompt", "token id -1"),
    ({"prompt": [2**70]}, "prompt", "outside the vocabulary"),
    ({"prompt": [True]}, "prompt[0]", "got true"),
    ({"prompt": None}, "prompt", "got null"),
    ({"prompt": {"a": 1}}, "prompt", "a string or a list"),
    ({"prompt": "x" * 129}, "prompt", "maximum context length is 128 tokens"),
    ({"prompt": "x" * 128}, "prompt", "no room"),
    ({"prompt": "x" * 100, "max_tokens": 29}, "max_tokens", "28"),
    ({"prompt": "x" * 500_000}, "prompt", "maximum context length"),
    ({"prompt": ["fine", "x" * 200]}, "prompt", "200"),
    ({"prompt": ["a"] * 1024, "n": 5}, "n", "1024 prompts with n=5 are 5120 completions"),
    ({"logprobs": 21}, "logprobs", "20"),
    ({"logprobs": True}, "logprobs", "an integer"),
    ({"suffix": "end"}, "suffix", "not supported"),
]
CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": "hi"}, "messages", 'must be a list, got "hi"'),
    ({"messages": None}, "messages", "must be a list"),
    ({"messages": [1]}, "messages[0]", "an object"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "king"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got 5"),
    (
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        "messages[0].content[0].type",
        "text only",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "required",
    ),
    (
        {
            "messages": [
                *USER,
                {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]},
            ]
        },
        "messages[1].tool_calls[0].function.arguments",
        "JSON",
    ),
    ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "128 tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ({"max_completion_tokens": 127}, "max_completion_tokens", "too large"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "required"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"modalities": ["audio"]}, "modalities", "audio"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "--chat-template"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "exclude",
    ),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "an object"),
]
CASES = [
    *(("/v1/completions", *case) for case in COMMON + COMPLETION),
    *(("/v1/chat/completions", *case) for case in COMMON + CHAT),
]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": "hi"},
    "/v1/chat/completions": {"model": MODEL, "messages": USER},
}


def check_envelope(status: int, answer: Any, kind: str) -> dict[str, Any]:
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["type"] == kind
    return error


async def test_every_bad_field_is_named(served: Served) -> None:
    """One server for all cases; each is followed by a request that works."""
    for path, change, param, words in CASES:
        for stream in (False, True):
            body = {**GOOD[path], "stream": stream, **change}
            status, answer = await served.post(path, body)
            assert status == 400, (path, change, answer)
            error = check_envelope(400, answer, "BadRequestError")
            assert error["param"] == param, (path, change, error)
            assert words in error["message"], (path, change, error)
            assert not served.core.open
        await served.still_works()


async def test_what_cannot_be_streamed(served: Served) -> None:
    for path, good in GOOD.items():
        body = {**good, "stream": True, "prompt_logprobs": 1}
        status, answer = await served.post(path, body)
        assert (status, answer["error"]["param"]) == (400, "prompt_logprobs")
        body = {**good, "stream_options": {"include_usage": True}}
        status, answer = await served.post(path, body)
        assert (status, answer["error"]["param"]) == (400, "stream_options")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a",}', "byte 15"),
        (b'{"temperature": NaN}', "byte 16"),
        (b'{"temperature": Infinity}', "not valid JSON"),
        (b'{"temperature": 1e999}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[1]", "JSON object, got [1]"),
        (b'"text"', "JSON object"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
async def test_bodies_that_are_not_json_objects(served: Served, body: bytes, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    for path in GOOD:
        async with served.http.post(served.url + path, data=body, headers=headers) as response:
            error = check_envelope(response.status, await response.json(), "BadRequestError")
            assert response.status == 400
            assert words in error["message"]
    await served.still_works()


async def test_required_fields(served: Served) -> None:
    for path, name in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        status, answer = await served.post(path, {"model": MODEL})
        error = check_envelope(status, answer, "BadRequestError")
        assert error["param"] == name
        assert "required" in error["message"]
    status, answer = await served.post("/tokenize", {})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    status, answer = await served.post("/detokenize", {"tokens": [999]})
    assert (status, answer["error"]["param"]) == (400, "tokens")


async def test_content_types(served: Served) -> None:
    url = f"{served.url}/v1/completions"
    headers = {"Content-Type": "text/plain"}
    async with served.http.post(url, data=b'{"prompt": "x"}', headers=headers) as response:
        assert response.status == 415
        check_envelope(415, await response.json(), "UnsupportedMediaTypeError")
    for content_type in ("application/json", "application/json; charset=utf-8"):
        headers = {"Content-Type": content_type}
        async with served.http.post(url, data=b'{"prompt": "x"}', headers=headers) as response:
            assert response.status == 200
    skip: Any = {"skip_auto_headers": ["Content-Type"]}
    async with served.http.post(url, data=b'{"prompt": "x"}', **skip) as response:
        assert response.status == 200


async def test_unknown_model_route_and_method(served: Served) -> None:
    for path, good in GOOD.items():
        for stream in (False, True):
            body = {**good, "model": "gpt-9", "stream": stream}
            status, answer = await served.post(path, body)
            error = check_envelope(404, answer, "NotFoundError")
            assert status == 404
            assert error["param"] == "model"
            assert "`gpt-9`" in error["message"]
            assert f"`{MODEL}`" in error["message"]
    status, answer = await served.post("/v1/nothing", {})
    check_envelope(status, answer, "NotFoundError")
    async with served.http.get(f"{served.url}/v1/completions") as response:
        check_envelope(response.status, await response.json(), "MethodNotAllowedError")
        assert response.status == 405
        assert "POST" in response.headers["Allow"]


@pytest.mark.parametrize("declared", [True, False])
async def test_large_bodies(serve: Serve, *, declared: bool) -> None:
    served = await serve(max_body_bytes=2000)

    async def pieces():
        for _ in range(30):
            yield b" " * 100

    data = b" " * 3000 if declared else pieces()
    headers = {"Content-Type": "application/json"}
    url = f"{served.url}/v1/completions"
    async with served.http.post(url, data=data, headers=headers) as response:
        error = check_envelope(response.status, await response.json(), "PayloadTooLargeError")
        assert response.status == 413
        assert "2000" in error["message"]
    await served.still_works()


async def test_the_official_client_sees_typed_errors(served: Served) -> None:
    create: Any = served.openai.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        await create(model=MODEL, messages=USER, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        await create(model=MODEL, messages=USER, temperature=9, stream=True)
    with pytest.raises(openai.NotFoundError):
        await create(model="nope", messages=USER, stream=True)
    await served.still_works()
