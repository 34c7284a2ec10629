"""/v1/chat/completions, /tokenize and /detokenize, against the real engine."""

from typing import Any

import pytest

from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.e2e.api import CHAT, COMPLETIONS, Api, Choice

USER = {"role": "user", "content": "Hi fox"}


def chat(api: Api, *messages: dict[str, Any], **body: Any) -> Choice:
    settings = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    return api.whole(CHAT, messages=list(messages), **settings | body).only


def prompt_of(tokenizer: Tokenizer, choice: Choice) -> str:
    assert choice.prompt_token_ids is not None
    return tokenizer.decode(choice.prompt_token_ids, skip_special_tokens=False)


def test_answer_of_the_official_client(api: Api) -> None:
    answer = api.openai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=7,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.refusal is None
    assert not choice.message.tool_calls
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.system_fingerprint


def test_the_template_is_applied(api: Api, tokenizer: Tokenizer) -> None:
    choice = chat(api, {"role": "system", "content": "Be brief."}, USER)
    shown = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi fox<|im_end|>\n"
    assert prompt_of(tokenizer, choice) == shown + "<|im_start|>assistant\n"
    completion = api.complete(choice.prompt_token_ids)
    assert (completion.text, completion.token_ids) == (choice.text, choice.token_ids)
    # max_tokens absent: all that the context leaves, not 16.
    answer = api.whole(CHAT, messages=[USER], temperature=0, ignore_eos=True)
    assert answer.usage["total_tokens"] == 256


def test_forms_of_message(api: Api, tokenizer: Tokenizer) -> None:
    plain = chat(api, USER)
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "fox"}]
    assert prompt_of(tokenizer, chat(api, {**USER, "content": parts})) == (
        prompt_of(tokenizer, plain)
    )
    system = chat(api, {"role": "system", "content": "x"}, USER)
    assert chat(api, {"role": "developer", "content": "x"}, USER) == system
    named = chat(api, {**USER, "name": "ann"})
    assert "user ann\nHi fox" in prompt_of(tokenizer, named)
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    }
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    shown = prompt_of(tokenizer, chat(api, USER, called, result))
    assert "call weather" in shown
    assert "<|im_start|>tool\nsunny" in shown


def test_generation_prompt(api: Api, tokenizer: Tokenizer) -> None:
    shown = prompt_of(tokenizer, chat(api, USER, add_generation_prompt=False))
    assert shown == "<|im_start|>user\nHi fox<|im_end|>\n"
    begun = {"role": "assistant", "content": "The answer"}
    continued = {"continue_final_message": True, "add_generation_prompt": False}
    choice = chat(api, USER, begun, **continued)
    assert prompt_of(tokenizer, choice).endswith("<|im_start|>assistant\nThe answer")
    echoed = chat(api, USER, begun, **continued, echo=True)
    assert echoed.text == "The answer" + choice.text
    shown = prompt_of(tokenizer, chat(api, USER, chat_template_kwargs={"mood": "sad"}))
    assert shown.endswith("assistant\n(sad) ")


def test_tools(api: Api, tokenizer: Tokenizer) -> None:
    plain = chat(api, USER)
    assert chat(api, USER, tools=[], tool_choice="none") == plain
    assert chat(api, USER, tools=None, tool_choice=None) == plain
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    shown = chat(api, USER, tools=[tool], tool_choice="none")
    assert "tools: weather" in prompt_of(tokenizer, shown)


def test_max_completion_tokens_wins(api: Api) -> None:
    choice = chat(api, USER, max_completion_tokens=3, max_tokens=5)
    assert len(choice.token_ids) == 3
    assert len(chat(api, USER, max_tokens=5).token_ids) == 5


@pytest.mark.parametrize("num_top", [None, 0, 1, 5, 20])
def test_logprobs(api: Api, tokenizer: Tokenizer, num_top: int | None) -> None:
    top = {} if num_top is None else {"top_logprobs": num_top}
    choice = chat(api, USER, logprobs=True, seed=9, temperature=1, **top)
    entries = choice.logprobs["content"]
    assert len(entries) == len(choice.token_ids)
    for token, entry in zip(choice.token_ids, entries, strict=True):
        assert entry["token"] == tokenizer.token_text(token)
        assert bytes(entry["bytes"]) == tokenizer.token_bytes(token)
        assert entry["logprob"] <= 0
        values = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(values) == (num_top or 0)
        assert values == sorted(values, reverse=True)
    text = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
    assert tokenizer.decode(choice.token_ids, skip_special_tokens=False) == text


def test_greedy_logprobs(api: Api) -> None:
    choice = chat(api, USER, logprobs=True, top_logprobs=2)
    for entry in choice.logprobs["content"]:
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
    assert chat(api, USER).logprobs is None


def test_prompt_logprobs_stand_on_top(api: Api) -> None:
    body = {"messages": [USER], "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True}
    answer = api.post(CHAT, body)
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    assert "prompt_logprobs" not in answer["choices"][0]


def test_a_stop_string_and_n(api: Api) -> None:
    answer = api.whole(CHAT, messages=[USER], n=3, seed=2, max_tokens=40, stop=["e"])
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert "e" not in choice.text
        assert (choice.finish_reason == "stop") == (choice.stop_reason == "e") or (
            choice.stop_reason is None
        )


# Tokens.


def test_tokenize_and_back(api: Api, tokenizer: Tokenizer) -> None:
    text = "Once upon a 日本 🙂 <|im_end|>"
    shown = api.post("/tokenize", {"model": "tiny", "prompt": text, "return_token_strs": True})
    assert shown["tokens"] == tokenizer.encode(text)
    assert shown["count"] == len(shown["tokens"]) == len(shown["token_strs"])
    assert shown["max_model_len"] == 256
    assert api.post("/detokenize", {"tokens": shown["tokens"]}) == {"prompt": text}
    assert api.post("/tokenize", {"prompt": "x"})["token_strs"] is None
    assert api.post("/tokenize", {"prompt": ""})["tokens"] == []


def test_tokenize_messages(api: Api) -> None:
    choice = chat(api, USER)
    assert api.post("/tokenize", {"messages": [USER]})["tokens"] == choice.prompt_token_ids
    bare = api.post("/tokenize", {"messages": [USER], "add_generation_prompt": False})
    assert bare["count"] < len(choice.prompt_token_ids or [])


def test_usage_counts_what_tokenize_counts(api: Api) -> None:
    count = api.post("/tokenize", {"prompt": "The lazy dog"})["count"]
    answer = api.post(COMPLETIONS, {"prompt": "The lazy dog", "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == count
