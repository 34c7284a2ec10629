"""Text completions through the official client and as raw JSON; tokenize and detokenize."""

from typing import Any

import pytest

from tests.server.conftest import MODEL, Serve, Served
from tests.server.fake_core import expected_text

PROMPT = list(b"Once")


async def test_answer(served: Served) -> None:
    answer: Any = await served.openai.completions.create(
        model=MODEL, prompt="Once", max_tokens=8, temperature=0
    )
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == expected_text(PROMPT, 8)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == 8


async def test_default_is_16_tokens_and_null_all_that_fit(served: Served) -> None:
    _, answer = await served.post("/v1/completions", {"prompt": "Once"})
    assert answer["usage"]["completion_tokens"] == 16
    _, answer = await served.post("/v1/completions", {"prompt": "Once", "max_tokens": None})
    assert answer["usage"]["total_tokens"] == 128
    _, answer = await served.post("/v1/completions", {"prompt": "x" * 120})
    assert answer["usage"]["completion_tokens"] == 8  # the default bends, a given number does not


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "prompt", [["Once", "Twice"], [list(b"Once"), list(b"Twice")]], ids=["texts", "ids"]
)
async def test_several_prompts_and_n(served: Served, prompt: Any, *, stream: bool) -> None:
    body = {"prompt": prompt, "n": 2, "seed": 7, "max_tokens": 5, "stream": stream}
    status, answer = await served.post("/v1/completions", body)
    assert status == 200
    texts = ["", "", "", ""]
    for part in answer[:-1] if stream else [answer]:
        for choice in part["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [
        expected_text(list(text), 5, seed=seed) for text in (b"Once", b"Twice") for seed in (7, 8)
    ]
    if not stream:
        assert answer["usage"]["prompt_tokens"] == 9
        assert answer["usage"]["completion_tokens"] == 20
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs(served: Served, *, stream: bool) -> None:
    body = {
        "prompt": "Once",
        "max_tokens": 2,
        "echo": True,
        "logprobs": 2,
        "temperature": 0,
        "stream": stream,
    }
    _, answer = await served.post("/v1/completions", body)
    choices = [part["choices"][0] for part in (answer[:-1] if stream else [answer])]
    text = "".join(choice["text"] for choice in choices)
    assert text == "Once" + expected_text(PROMPT, 2)
    merged: dict[str, list[Any]] = {}
    for choice in choices:
        for name, values in choice["logprobs"].items():
            merged.setdefault(name, []).extend(values)
    assert merged["tokens"] == list(text)
    assert merged["text_offset"] == list(range(6))
    assert merged["token_logprobs"] == [None, -1.0, -1.0, -1.0, -1.0, -1.0]
    assert merged["top_logprobs"][0] is None
    assert merged["top_logprobs"][4] == {"z": -0.5, text[4]: -1.0}


async def test_echo_of_the_prompt_alone(served: Served) -> None:
    body = {"prompt": "Once", "max_tokens": 0, "echo": True, "logprobs": 0}
    _, answer = await served.post("/v1/completions", body)
    choice = answer["choices"][0]
    assert choice["text"] == "Once"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0, -1.0]
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids(served: Served, *, stream: bool) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "return_token_ids": True, "stream": stream}
    _, answer = await served.post("/v1/completions", body)
    choices = [part["choices"][0] for part in (answer[:-1] if stream else [answer])]
    assert choices[0]["prompt_token_ids"] == PROMPT
    ids = [token_id for choice in choices for token_id in choice["token_ids"]]
    assert bytes(ids).decode() == "".join(choice["text"] for choice in choices)


async def test_prompt_logprobs_are_per_choice(served: Served) -> None:
    body = {"prompt": "Once", "max_tokens": 1, "prompt_logprobs": 0}
    _, answer = await served.post("/v1/completions", body)
    shown = answer["choices"][0]["prompt_logprobs"]
    assert shown[0] is None
    assert shown[1] == {str(ord("n")): {"logprob": -1.0, "rank": 2, "decoded_token": "n"}}


async def test_every_sampling_field_reaches_the_core(served: Served) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 11,
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 1,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "allowed_token_ids": [97, 98],
        "max_tokens": 3,
    }
    body = {**fields, "prompt": "x", "logit_bias": {"97": 1}, "bad_words": ["no"]}
    status, answer = await served.post("/v1/completions", body)
    assert status == 200, answer
    sampling = served.core.added[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == {97: 1.0}
    assert sampling.bad_words_token_ids


async def test_integral_floats_and_truncation(served: Served) -> None:
    body = {"prompt": "abcdef", "max_tokens": 2.0, "n": 1.0, "truncate_prompt_tokens": 3}
    status, answer = await served.post("/v1/completions", body)
    assert status == 200, answer
    assert served.core.added[-1].prompt_token_ids == list(b"def")
    assert answer["usage"]["prompt_tokens"] == 3


async def test_stop_token_id(served: Served) -> None:
    text = expected_text(PROMPT, 9)
    body = {
        "prompt": "Once",
        "temperature": 0,
        "max_tokens": 20,
        "stop_token_ids": [ord(text[3])],
    }
    _, answer = await served.post("/v1/completions", body)
    assert answer["choices"][0]["text"] == text[: text.index(text[3])]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == ord(text[3])


async def test_priority_and_salt_reach_the_core(serve: Serve) -> None:
    served = await serve(policy="priority")
    body = {"prompt": "x", "priority": -3, "cache_salt": "me"}
    async with served.http.post(f"{served.url}/v1/completions", json=body) as response:
        assert response.status == 200
        assert "x-jaxinfer-ignored" not in response.headers
    assert served.core.added[-1].priority == -3
    assert served.core.added[-1].cache_salt == "me"


async def test_fields_without_effect_are_named(served: Served) -> None:
    body = {
        "prompt": "x",
        "user": "me",
        "metadata": {"a": "b"},
        "frobnicate": 1,
        "evil\r\nname: x": 1,
        "stream_options": {"include_usage": True, "colour": 1},
        "stream": True,
    }
    async with served.http.post(f"{served.url}/v1/completions", json=body) as response:
        assert response.status == 200
        named = set(response.headers["x-jaxinfer-ignored"].split(", "))
    assert named == {"frobnicate", "evil??name??x", "stream_options.colour"}


async def test_tokenize_and_back(served: Served) -> None:
    _, answer = await served.post("/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert answer["tokens"] == list("hé".encode())
    assert answer["count"] == 3
    assert answer["max_model_len"] == 128
    assert answer["token_strs"][0] == "h"
    _, text = await served.post("/detokenize", {"tokens": answer["tokens"]})
    assert text == {"prompt": "hé"}
    messages = [{"role": "user", "content": "hi"}]
    _, answer = await served.post("/tokenize", {"messages": messages})
    assert bytes(answer["tokens"]) == b"<user>hi<assistant>"


async def test_long_texts_are_encoded_in_a_thread(served: Served) -> None:
    """While a long text is encoded, the event loop answers others."""
    body = {"prompt": "x" * 100_000, "truncate_prompt_tokens": 5, "max_tokens": 1}
    status, answer = await served.post("/v1/completions", body)
    assert status == 400  # one byte a token: more than any context
    assert "at least" in answer["error"]["message"]
    _, answer = await served.post("/tokenize", {"prompt": "x" * 100})
    assert answer["count"] == 100
