"""What is wrong with a request is said before any work, with its field."""

from typing import Any

import pytest

from jaxinfer.core.messages import EngineInfo
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.inputs import InputProcessor
from jaxinfer.errors import RequestError
from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.engine.test_transport import INFO

FEW = SamplingParams(max_tokens=4)


def make(tokenizer: Tokenizer, **changes: Any) -> InputProcessor:
    fields = {name: getattr(INFO, name) for name in INFO.__struct_fields__}
    return InputProcessor(tokenizer, EngineInfo(**{**fields, "vocab_size": 259, **changes}))


@pytest.fixture
def inputs(tokenizer: Tokenizer) -> InputProcessor:
    return make(tokenizer)


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [
        ("ab", "ab", [97, 98]),
        ({"prompt": "ab"}, "ab", [97, 98]),
        ([97, 98], None, [97, 98]),
        ({"prompt_token_ids": [97]}, None, [97]),
        ({"prompt": "shown", "prompt_token_ids": [97]}, "shown", [97]),
        ("x" * 60, "x" * 60, [120] * 60),
    ],
)
def test_forms_of_prompts(inputs: InputProcessor, prompt: Any, text: str, ids: list[int]) -> None:
    valid = inputs.validate(prompt, FEW)
    assert (valid.text, valid.prompt_token_ids, valid.params) == (text, ids, FEW)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "must not be empty"),
        ([], "must not be empty"),
        ({}, "must hold 'prompt'"),
        ({"prompt_tokens": [1]}, "prompt_tokens"),
        (None, "got NoneType"),
        (5, "got int"),
        ([1, "a"], "got 'a'"),
        ([True], "got True"),
        ([1.0], "got 1.0"),
        ([259], "token id 259, which is outside the vocabulary .0 to 258."),
        ([-1, 5], "token id -1"),
        ("x" * 64, "context length is 64 tokens. However, your prompt contains 64 tokens"),
        ("x" * 1000, "at most 63 tokens"),
        ("\ud800", "[Uu]nicode"),
    ],
)
def test_bad_prompts(inputs: InputProcessor, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        inputs.validate(prompt, FEW)
    assert caught.value.param in ("prompt", None)


def test_the_caller_names_the_field(inputs: InputProcessor) -> None:
    with pytest.raises(RequestError) as caught:
        inputs.validate("x" * 64, FEW, param="messages")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        ({"max_tokens": 61}, "max_tokens", "max_tokens=61.* 4 tokens.* 64 tokens.* is 60"),
        ({"stop_token_ids": [259]}, "stop_token_ids", "259"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids", "-1"),
        ({"logit_bias": {1000: 1.0}}, "logit_bias", "1000"),
        ({"bad_words": ["x" * 9]}, "bad_words", "8 tokens"),
        ({"bad_words": [" "]}, "bad_words", "blank"),
        ({"logprobs": 6}, "logprobs", "at most 5, got 6"),
        ({"truncate_prompt_tokens": 64}, "truncate_prompt_tokens", "1 and 63, got 64"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "got 0"),
    ],
)
def test_bad_params(tokenizer: Tokenizer, params: Any, param: str, message: str) -> None:
    inputs = make(tokenizer, max_logprobs=5)
    with pytest.raises(RequestError, match=message) as caught:
        inputs.validate("abcd", SamplingParams(**params))
    assert caught.value.param == param


def test_the_whole_context_may_be_used(inputs: InputProcessor) -> None:
    inputs.validate("abcd", SamplingParams(max_tokens=60))
    inputs.validate("x" * 63, SamplingParams(max_tokens=1))
    inputs.validate("x" * 63, SamplingParams(max_tokens=None))
    inputs.validate("x" * 64, SamplingParams(max_tokens=0))


def test_a_default_max_tokens_may_be_lowered(inputs: InputProcessor) -> None:
    params = SamplingParams(max_tokens=16, min_tokens=16)
    valid = inputs.validate("x" * 60, params, clamp_max_tokens=True)
    assert (valid.params.max_tokens, valid.params.min_tokens) == (4, 4)


@pytest.mark.parametrize(("keep", "kept"), [(3, 3), (200 - 180, 20), (-1, 64 - 4), (63, 63)])
def test_truncation_keeps_the_end(inputs: InputProcessor, keep: int, kept: int) -> None:
    params = SamplingParams(max_tokens=min(4, 64 - kept), truncate_prompt_tokens=keep)
    ids = list(range(200))
    assert inputs.validate(ids, params).prompt_token_ids == ids[-kept:]


def test_bad_words_become_tokens_and_validation_is_idempotent(inputs: InputProcessor) -> None:
    params = SamplingParams(bad_words=["ab"], truncate_prompt_tokens=2)
    once = inputs.validate("xyz", params)
    assert [97, 98] in once.params.bad_words_token_ids
    assert inputs.validate(once.prompt_token_ids, once.params).params == once.params


def test_a_tokenizer_larger_than_the_model_is_warned_about(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    make(tokenizer)
    assert not caplog.records
    make(tokenizer, vocab_size=100)
    assert "the tokenizer has 259 tokens but the model only 100" in caplog.text
