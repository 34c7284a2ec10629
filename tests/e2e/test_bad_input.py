"""What a client can get wrong, against the real engine: status, field, value, repair; streamed
and not; and the next request works. (Every field of the protocol: tests/server/test_bad_input.py.)
"""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import openai
import pytest

from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.e2e.api import CHAT, COMPLETIONS, Api, until
from tests.e2e.conftest import MAX_MODEL_LEN

USER = [{"role": "user", "content": "hi"}]
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "tiny", "prompt": "Once upon", "max_tokens": 4},
    CHAT: {"model": "tiny", "messages": USER, "max_tokens": 4},
}
BOTH = (COMPLETIONS, CHAT)
CONTEXT = f"maximum context length is {MAX_MODEL_LEN} tokens"
LONG = "fox " * 2000

# paths, change to a good body, field that is named, words of the message
CASES: list[tuple[tuple[str, ...], dict[str, Any], str, list[str]]] = [
    # longer than the context
    ((COMPLETIONS,), {"prompt": LONG}, "prompt", [CONTEXT, "shorten the prompt"]),
    ((COMPLETIONS,), {"prompt": [5] * (MAX_MODEL_LEN + 1)}, "prompt", [CONTEXT, "contains 257"]),
    ((COMPLETIONS,), {"prompt": [5] * MAX_MODEL_LEN}, "prompt", ["no room for an answer"]),
    ((COMPLETIONS,), {"prompt": ["fine", LONG]}, "prompt", [CONTEXT]),
    ((CHAT,), {"messages": [{"role": "user", "content": LONG}]}, "messages", [CONTEXT]),
    ((COMPLETIONS,), {"prompt": "x" * 2_000_000}, "prompt", [CONTEXT]),
    # max_tokens over the context
    (BOTH, {"max_tokens": MAX_MODEL_LEN}, "max_tokens", ["max_tokens=256", "The largest"]),
    (BOTH, {"max_tokens": 10**9}, "max_tokens", ["max_tokens=1000000000", "The largest"]),
    ((COMPLETIONS,), {"prompt": [5] * 200, "max_tokens": 57}, "max_tokens", ["57", "is 56"]),
    (BOTH, {"max_tokens": 0}, "max_tokens", ["at least 1", "got 0"]),
    (BOTH, {"max_tokens": -5}, "max_tokens", ["-5"]),
    # empty
    ((COMPLETIONS,), {"prompt": ""}, "prompt", ["must not be empty"]),
    ((COMPLETIONS,), {"prompt": []}, "prompt", ["must not be empty"]),
    ((COMPLETIONS,), {"prompt": [[]]}, "prompt", ["must not be empty"]),
    ((COMPLETIONS,), {"prompt": ["fine", ""]}, "prompt", ["must not be empty"]),
    ((CHAT,), {"messages": []}, "messages", ["empty"]),
    # token ids out of range
    ((COMPLETIONS,), {"prompt": [1, 99_999]}, "prompt", ["token id 99999", "vocabulary (0 to"]),
    ((COMPLETIONS,), {"prompt": [-1]}, "prompt", ["token id -1", "vocabulary (0 to"]),
    ((COMPLETIONS,), {"prompt": [[1], [2**40]]}, "prompt", [str(2**40), "vocabulary (0 to"]),
    (BOTH, {"stop_token_ids": [99_999]}, "stop_token_ids", ["99999", "vocabulary (0 to"]),
    (BOTH, {"allowed_token_ids": [-2]}, "allowed_token_ids", ["-2", "vocabulary (0 to"]),
    (BOTH, {"logit_bias": {"99999": 1}}, "logit_bias", ["99999", "vocabulary (0 to"]),
    # sampling values out of range
    (BOTH, {"temperature": -0.1}, "temperature", ["[0, 2]", "got -0.1"]),
    (BOTH, {"temperature": 2.1}, "temperature", ["[0, 2]", "got 2.1"]),
    (BOTH, {"top_p": 0}, "top_p", ["(0, 1]", "got 0"]),
    (BOTH, {"top_p": 1.01}, "top_p", ["(0, 1]", "got 1.01"]),
    (BOTH, {"top_k": -2}, "top_k", ["-2"]),
    (BOTH, {"min_p": -1}, "min_p", ["[0, 1]", "got -1"]),
    (BOTH, {"presence_penalty": 3}, "presence_penalty", ["[-2, 2]", "got 3"]),
    (BOTH, {"frequency_penalty": -3}, "frequency_penalty", ["[-2, 2]", "got -3"]),
    (BOTH, {"repetition_penalty": 0}, "repetition_penalty", ["got 0"]),
    (BOTH, {"n": 0}, "n", ["between 1 and 128", "got 0"]),
    (BOTH, {"seed": 2**64}, "seed", ["between", str(2**64)]),
    ((COMPLETIONS,), {"logprobs": 21}, "logprobs", ["between 0 and 20", "got 21"]),
    ((CHAT,), {"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["0 and 20", "got 21"]),
    # wrong types
    (BOTH, {"temperature": "hot"}, "temperature", ["a number", '"hot"']),
    (BOTH, {"temperature": [1]}, "temperature", ["a number", "[1]"]),
    (BOTH, {"max_tokens": "many"}, "max_tokens", ["an integer", '"many"']),
    (BOTH, {"max_tokens": 1.5}, "max_tokens", ["an integer", "1.5"]),
    (BOTH, {"n": True}, "n", ["an integer", "true"]),
    (BOTH, {"stop": 5}, "stop", ["a string or a list", "got 5"]),
    (BOTH, {"stream": "yes"}, "stream", ["true or false", '"yes"']),
    (BOTH, {"model": 5}, "model", ["a string", "got 5"]),
    ((COMPLETIONS,), {"prompt": 5}, "prompt", ["a string or a list", "got 5"]),
    ((COMPLETIONS,), {"prompt": ["a", 1]}, "prompt", ["mixture"]),
    ((CHAT,), {"messages": "hi"}, "messages", ["a list", '"hi"']),
    ((CHAT,), {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", ["king"]),
    ((CHAT,), {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ["got 5"]),
    # what this version does not do
    (BOTH, {"response_format": {"type": "json_object"}}, "response_format", ["not supported"]),
    ((CHAT,), {"tools": [{"type": "function"}]}, "tools", ["not supported"]),
    (BOTH, {"priority": 1}, "priority", ["--scheduling-policy priority"]),
]
SINGLE = [(path, *case[1:]) for case in CASES for path in case[0]]


def check_envelope(answer: Any, status: int, kind: str) -> dict[str, Any]:
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (status, kind)
    assert "Traceback" not in error["message"]
    return error


def expect_life(api: Api) -> None:
    """The next request works, and nothing is left over of the one before."""
    first, second = (api.complete("Once upon", max_tokens=4) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert len(first.token_ids) == 4


def post_raw(api: Api, path: str, body: bytes) -> tuple[int, Any]:
    with closing(api.connect()) as connection:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.mark.parametrize(("path", "change", "param", "words"), SINGLE)
def test_a_bad_field_is_named(
    api: Api, path: str, change: dict[str, Any], param: str, words: list[str]
):
    for stream in (False, True):
        body = GOOD[path] | {"stream": stream} | change
        error = check_envelope(api.post(path, body, status=400), 400, "BadRequestError")
        assert error["param"] == param, error
        for word in words:
            assert word in error["message"], error
        assert len(error["message"]) < 1000
    expect_life(api)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a",}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": Infinity}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b"[1]", "a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_body_that_is_no_json_object(api: Api, body: bytes, words: str):
    for path in GOOD:
        status, answer = post_raw(api, path, body)
        error = check_envelope(answer, 400, "BadRequestError")
        assert (status, error["code"]) == (400, 400)
        assert words in error["message"]
    expect_life(api)


def test_unknown_models_routes_and_methods(api: Api):
    for path, good in GOOD.items():
        for stream in (False, True):
            answer = api.post(path, good | {"model": "gpt-9", "stream": stream}, status=404)
            error = check_envelope(answer, 404, "NotFoundError")
            assert error["param"] == "model"
            assert "`gpt-9`" in error["message"] and "`tiny`" in error["message"]
        response = api.get(path)
        assert (response.status, response.headers["allow"]) == (405, "POST")
        check_envelope(response.json(), 405, "MethodNotAllowedError")
    check_envelope(api.post("/v1/nothing", {}, status=404), 404, "NotFoundError")
    text = {"Content-Type": "text/plain"}
    response = api.request("POST", COMPLETIONS, GOOD[COMPLETIONS], headers=text)
    assert response.status == 415
    check_envelope(response.json(), 415, "UnsupportedMediaTypeError")
    expect_life(api)


def test_the_longest_prompt_and_answer_are_taken(api: Api):
    """The limits that the messages name are the true ones."""
    prompt = [5] * (MAX_MODEL_LEN - 1)
    assert len(api.complete(prompt, max_tokens=1).token_ids) == 1
    assert len(api.complete([5] * 200, max_tokens=56).token_ids) == 56
    filled = api.complete([5], max_tokens=MAX_MODEL_LEN - 1)
    assert len(filled.token_ids) == MAX_MODEL_LEN - 1
    assert filled.finish_reason == "length"


def test_the_vocabulary_ends_where_the_message_says(api: Api, tokenizer: Tokenizer):
    last = tokenizer.vocab_size - 1
    api.complete([last])
    answer = api.post(COMPLETIONS, {"prompt": [last + 1]}, status=400)
    assert f"(0 to {last})" in answer["error"]["message"]


def test_bad_requests_among_good_ones_change_nothing(api: Api):
    """Good requests that run while bad ones come get the tokens that they get alone."""
    prompts = ["The quick brown", "Once upon a time", "lazy dog", "Naïve"]
    bodies = [
        {"prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
        for prompt in prompts
    ]
    alone = [api.whole(COMPLETIONS, **body).only.text for body in bodies]
    bad = [body | {"temperature": 9} for body in bodies]

    def send(item: tuple[bool, dict[str, Any]]) -> str | int:
        is_good, body = item
        response = api.request("POST", COMPLETIONS, body)
        return response.json()["choices"][0]["text"] if is_good else response.status

    jobs = [
        job for pair in zip(bodies, bad, strict=True) for job in ((True, pair[0]), (False, pair[1]))
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(send, jobs))
    assert answers[::2] == alone
    assert answers[1::2] == [400] * len(bad)


def test_nothing_is_left_over(api: Api):
    """After all of it: no page in use, no request waiting, no shape compiled late."""

    def gauges() -> dict[str, float]:
        return {name.partition("{")[0]: value for name, value in api.metrics().items()}

    until(lambda: gauges()["jaxinfer:num_requests_running"] == 0)
    until(lambda: gauges()["jaxinfer:kv_cache_usage_perc"] == 0)
    assert gauges()["jaxinfer:num_requests_waiting"] == 0
    assert "Traceback" not in "".join(api.log)


def test_the_official_client_sees_typed_errors(api: Api):
    create: Any = api.openai.chat.completions.create
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            create(model="tiny", messages=USER, temperature=9, stream=stream)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError, match="gpt-9"):
            create(model="gpt-9", messages=USER, stream=stream)
    expect_life(api)
