"""/v1/completions as OpenAI's and vLLM's users know it, against the real engine."""

import math
from typing import Any

import pytest

from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.e2e.api import COMPLETIONS, Api
from tests.e2e.conftest import MAX_MODEL_LEN

PROMPT = "Once upon a time there was"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


def test_answer_of_the_official_client(api: Api) -> None:
    answer = api.openai.completions.create(model="tiny", prompt=PROMPT, extra_body=GREEDY)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    [choice] = answer.choices
    assert choice.finish_reason == "length"
    assert choice.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16  # OpenAI's default
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16


def test_forms_of_prompt(api: Api, tokenizer: Tokenizer) -> None:
    other = "The fox"
    ids, other_ids = tokenizer.encode(PROMPT), tokenizer.encode(other)
    one, two = api.complete(PROMPT), api.complete(other)
    assert one.prompt_token_ids == ids
    assert api.complete(ids) == one
    assert api.complete([ids]) == one
    for prompts in ([PROMPT, other], [ids, other_ids]):
        body = {"prompt": prompts, "max_tokens": 8, "return_token_ids": True, **GREEDY}
        answer = api.whole(COMPLETIONS, **body)
        assert answer.choices == [one, two]
        assert answer.usage["prompt_tokens"] == len(ids) + len(other_ids)
        assert answer.usage["completion_tokens"] == 16


def test_n_counts_choices_of_each_prompt(api: Api) -> None:
    body = {"prompt": [PROMPT, "The fox"], "n": 3, "max_tokens": 6, "seed": 5, "ignore_eos": True}
    answer = api.whole(COMPLETIONS, **body)
    assert len({choice.text for choice in answer.choices}) == 6
    assert answer.usage["completion_tokens"] == 36
    assert api.whole(COMPLETIONS, **body).choices == answer.choices
    # The first of n is what the seed gives alone.
    alone = api.whole(COMPLETIONS, **{**body, "n": 1})
    assert alone.choices == [answer.choices[0], answer.choices[3]]
    assert api.whole(COMPLETIONS, **body, best_of=3).choices == answer.choices


def test_text_is_the_decoded_tokens(api: Api, tokenizer: Tokenizer) -> None:
    choice = api.complete(temperature=1.5, seed=3, max_tokens=100)
    assert len(choice.token_ids) == 100
    shown = tokenizer.decode(choice.token_ids)
    assert choice.text == shown
    choice = api.complete(temperature=1.5, seed=3, max_tokens=100, skip_special_tokens=False)
    assert choice.text == tokenizer.decode(choice.token_ids, skip_special_tokens=False)


def test_skip_special_tokens(api: Api, tokenizer: Tokenizer) -> None:
    [start] = tokenizer.encode("<|im_start|>")
    forced = {"logit_bias": {str(start): 100}, "max_tokens": 2}
    assert api.complete(**forced).text == ""
    assert api.complete(**forced, skip_special_tokens=False).text == "<|im_start|>" * 2


def test_a_seed_is_repeatable_and_seeds_differ(api: Api) -> None:
    sampled = {"temperature": 1.0, "max_tokens": 12}
    one = api.complete(seed=1, **sampled)
    assert api.complete(seed=1, **sampled) == one
    assert api.complete(seed=2, **sampled) != one
    assert api.complete(**sampled).token_ids != api.complete(**sampled).token_ids


def test_a_seed_is_independent_of_company(api: Api) -> None:
    """Alone, streamed, and among sixteen others twice as many as fit: the same tokens."""
    bodies = [
        {
            "prompt": PROMPT[: 5 + i],
            "seed": i,
            "max_tokens": 10 + i,
            "temperature": (0.0, 1.0)[i % 2],
            "ignore_eos": True,
            "return_token_ids": True,
        }
        for i in range(16)
    ]
    alone = [api.whole(COMPLETIONS, **body).only for body in bodies]
    mixed = [(COMPLETIONS, {**body, "stream": i % 3 == 0}) for i, body in enumerate(bodies)]
    together = [answer.only for answer in api.together(mixed)]
    assert [choice.token_ids for choice in together] == [choice.token_ids for choice in alone]
    assert [choice.text for choice in together] == [choice.text for choice in alone]


@pytest.mark.parametrize("same", [{"top_k": 1}, {"min_p": 1}, {"top_p": 1e-6}])
def test_narrowest_sampling_is_greedy(api: Api, same: dict[str, Any]) -> None:
    greedy = api.complete(max_tokens=12)
    assert api.complete(max_tokens=12, temperature=1.3, seed=4, **same).text == greedy.text


# Stops.


def test_stop_strings(api: Api) -> None:
    text = api.complete(max_tokens=30).text
    # Long enough to lie across tokens, and not at the start.
    stop = text[9:13]
    cut = text[: text.index(stop)]
    for given in (stop, [stop], ["never in the text", stop]):
        choice = api.complete(max_tokens=30, stop=given)
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (cut, "stop", stop)
    choice = api.complete(max_tokens=30, stop=stop, include_stop_str_in_output=True)
    assert (choice.text, choice.stop_reason) == (cut + stop, stop)
    choice = api.complete(max_tokens=30, stop="never in the text")
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (text, "length", None)


def test_stop_token_ids(api: Api, tokenizer: Tokenizer) -> None:
    free = api.complete(max_tokens=20)
    stop = free.token_ids[6]
    end = free.token_ids.index(stop) + 1
    choice = api.complete(max_tokens=20, stop_token_ids=[stop])
    assert choice.token_ids == free.token_ids[:end]
    assert choice.text == tokenizer.decode(free.token_ids[: end - 1])
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    choice = api.complete(max_tokens=20, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert choice.text == tokenizer.decode(free.token_ids[:end])


def test_eos(api: Api, tokenizer: Tokenizer) -> None:
    [eos] = tokenizer.eos_token_ids
    bias = {"logit_bias": {str(eos): 100}, "max_tokens": 5, "ignore_eos": False}
    choice = api.complete(**bias)
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("", "stop", None)
    assert choice.token_ids == [eos]
    assert api.complete(**{**bias, "ignore_eos": True}).finish_reason == "length"
    choice = api.complete(**bias, min_tokens=3)
    assert len(choice.token_ids) == 4
    assert choice.token_ids[-1] == eos
    assert eos not in choice.token_ids[:3]


def test_min_tokens_holds_off_stops(api: Api) -> None:
    free = api.complete(max_tokens=20)
    stop = free.token_ids[2]
    choice = api.complete(max_tokens=20, stop_token_ids=[stop], min_tokens=10)
    assert len(choice.token_ids) > 10
    assert stop not in choice.token_ids[:10]
    first = free.text[1:3]
    choice = api.complete(max_tokens=20, stop=first, min_tokens=8)
    assert len(choice.token_ids) >= 8
    assert choice.text.startswith(free.text[:3])


def test_lengths(api: Api, tokenizer: Tokenizer) -> None:
    num_prompt = len(tokenizer.encode(PROMPT))
    answer = api.whole(COMPLETIONS, prompt=PROMPT, max_tokens=None, **GREEDY)
    assert answer.usage["total_tokens"] == MAX_MODEL_LEN
    room = MAX_MODEL_LEN - num_prompt
    assert len(api.complete(PROMPT, max_tokens=room).token_ids) == room
    error = api.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": room + 1}, status=400)
    assert error["error"]["param"] == "max_tokens"
    full = api.complete([5] * (MAX_MODEL_LEN - 1), max_tokens=1)
    assert (len(full.token_ids), full.finish_reason) == (1, "length")


def test_truncated_prompt(api: Api, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    assert api.complete(PROMPT, truncate_prompt_tokens=4) == api.complete(ids[-4:])
    long = ids * 100
    assert (
        api.complete(long, truncate_prompt_tokens=-1, max_tokens=8).prompt_token_ids
        == (long[-(MAX_MODEL_LEN - 8) :])
    )


# What changes the distribution.


def test_allowed_token_ids(api: Api) -> None:
    allowed = [20, 30, 40]
    choice = api.complete(temperature=2, seed=1, max_tokens=30, allowed_token_ids=allowed)
    assert 1 < len(set(choice.token_ids)) <= 3
    assert set(choice.token_ids) <= set(allowed)


def test_logit_bias(api: Api) -> None:
    free = api.complete()
    assert api.complete(logit_bias={"33": 100}).token_ids == [33] * 8
    first = free.token_ids[0]
    assert first not in api.complete(logit_bias={str(first): -100}).token_ids


def test_bad_words(api: Api, tokenizer: Tokenizer) -> None:
    allowed = [tokenizer.encode(letter)[0] for letter in "abc"]
    body = {"temperature": 2, "seed": 2, "max_tokens": 90, "allowed_token_ids": allowed}
    assert "ab" in api.complete(**body).text
    text = api.complete(**body, bad_words=["ab"]).text
    assert "ab" not in text
    assert {"a", "b"} < set(text)


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2}],
    ids=lambda value: next(iter(value)),
)
def test_penalties(api: Api, penalty: dict[str, Any]) -> None:
    """Penalised tokens repeat less."""
    body = {"temperature": 1, "seed": 6, "max_tokens": 60, "allowed_token_ids": list(range(90))}
    free, penalised = api.complete(**body), api.complete(**body, **penalty)
    assert len(set(penalised.token_ids)) > len(set(free.token_ids)) + 3


# Log-probabilities.


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs(api: Api, tokenizer: Tokenizer, num_top: int) -> None:
    choice = api.complete(logprobs=num_top, temperature=1, seed=8, max_tokens=12)
    shown = choice.logprobs
    assert [tokenizer.token_text(token) for token in choice.token_ids] == shown["tokens"]
    assert all(value <= 0 for value in shown["token_logprobs"])
    for text, value, top in zip(
        shown["tokens"], shown["token_logprobs"], shown["top_logprobs"], strict=True
    ):
        assert 1 <= len(top) <= num_top + 1
        assert list(top.values()) == sorted(top.values(), reverse=True)
        if "\ufffd" not in text:
            assert top[text] == value
    check_offsets(choice.text, shown)


def test_greedy_token_is_the_likeliest(api: Api) -> None:
    shown = api.complete(logprobs=20).logprobs
    for value, top in zip(shown["token_logprobs"], shown["top_logprobs"], strict=True):
        assert value == max(top.values())
        assert sum(math.exp(other) for other in top.values()) <= 1 + 1e-5


def check_offsets(text: str, shown: Any) -> None:
    """Each token begins where `text_offset` says."""
    offsets = shown["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    for offset, token in zip(offsets, shown["tokens"], strict=True):
        if "\ufffd" not in token and not token.startswith("<|"):
            assert text[offset : offset + len(token)] == token


def test_offsets_of_split_characters(api: Api, tokenizer: Tokenizer) -> None:
    text = "a🙂 日本語 b"
    answer = api.complete(text, echo=True, max_tokens=0, logprobs=0)
    assert answer.text == text
    check_offsets(text, answer.logprobs)
    assert any("\ufffd" in token for token in answer.logprobs["tokens"])
    assert answer.logprobs["text_offset"][-1] == text.index("b")


def test_echo(api: Api, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    plain = api.complete(PROMPT)
    echoed = api.complete(PROMPT, echo=True)
    assert echoed.text == PROMPT + plain.text
    assert echoed.token_ids == plain.token_ids
    assert echoed.logprobs is None
    assert api.complete(ids, echo=True).text == echoed.text
    scored = api.complete(PROMPT, echo=True, logprobs=2)
    assert scored.text == echoed.text
    assert len(scored.logprobs["tokens"]) == len(ids) + 8
    assert scored.logprobs["token_logprobs"][0] is None
    assert scored.logprobs["top_logprobs"][0] is None
    check_offsets(scored.text, scored.logprobs)
    alone = api.complete(PROMPT, logprobs=2)
    shift = len(PROMPT)
    assert alone.logprobs["tokens"] == scored.logprobs["tokens"][len(ids) :]
    assert [offset + shift for offset in alone.logprobs["text_offset"]] == (
        scored.logprobs["text_offset"][len(ids) :]
    )


def test_echo_alone_scores_the_prompt(api: Api, tokenizer: Tokenizer) -> None:
    """max_tokens=0, as evaluation harnesses send it; equal to what generation says."""
    first = api.complete(PROMPT, logprobs=1, max_tokens=6)
    assert first.prompt_token_ids is not None
    whole = [*first.prompt_token_ids, *first.token_ids]
    scored = api.complete(whole, echo=True, logprobs=1, max_tokens=0)
    assert (scored.finish_reason, scored.token_ids) == ("length", [])
    assert len(scored.logprobs["tokens"]) == len(whole)
    assert scored.logprobs["token_logprobs"][-6:] == pytest.approx(
        first.logprobs["token_logprobs"], abs=1e-4
    )


def test_prompt_logprobs(api: Api, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    for num_top in (0, 3):
        body = {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": num_top, **GREEDY}
        [choice] = api.post(COMPLETIONS, body)["choices"]
        entries = choice["prompt_logprobs"]
        assert entries[0] is None
        assert len(entries) == len(ids)
        for token, entry in zip(ids[1:], entries[1:], strict=True):
            own = entry[str(token)]
            assert own["decoded_token"] == tokenizer.token_text(token)
            assert own["rank"] >= 1
            assert num_top <= len(entry) <= num_top + 1 or len(entry) == 1
            ranks = sorted(value["rank"] for value in entry.values())
            assert ranks[:num_top] == list(range(1, num_top + 1))


def test_tokens_as_ids(api: Api) -> None:
    choice = api.complete(logprobs=1, return_tokens_as_token_ids=True)
    assert choice.logprobs["tokens"] == [f"token_id:{token}" for token in choice.token_ids]


# The cache.


def test_cached_tokens_and_salt(api: Api) -> None:
    prompt = [(7 * i) % 300 for i in range(100)]

    def cached(**body: Any) -> int:
        answer = api.whole(COMPLETIONS, prompt=prompt, max_tokens=4, **GREEDY, **body)
        assert answer.usage["prompt_tokens"] == 100
        assert answer.usage["completion_tokens"] == 4
        return answer.usage["prompt_tokens_details"]["cached_tokens"]

    assert cached() == 0
    assert cached() == 96  # whole pages of 16
    assert cached(cache_salt="of one tenant") == 0
    assert cached(cache_salt="of one tenant") == 96
    assert cached(cache_salt="of another") == 0


def test_a_cached_prefix_changes_nothing(api: Api) -> None:
    prompt = [(11 * i) % 300 for i in range(90)]
    body = {"max_tokens": 12, "seed": 1, "temperature": 1}
    assert api.complete(prompt, cache_salt="a", **body) == api.complete(
        prompt, cache_salt="a", **body
    )
