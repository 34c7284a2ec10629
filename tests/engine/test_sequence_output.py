"""Text of one sequence: stop strings, stop tokens, special tokens, half characters."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.core.messages import SequenceUpdate
from jaxinfer.core.outputs import CompletionOutput
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import TokenLogprobs
from jaxinfer.engine.sequence_output import SequenceOutput
from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.engine.fake_runner import EOS


def run(
    tokenizer: Tokenizer,
    params: SamplingParams,
    chunks: list[list[int]],
    *,
    finish: str | None = "length",
    stop_reason: int | None = None,
) -> tuple[CompletionOutput, CompletionOutput, bool]:
    """(everything at the end, all deltas joined, whether the core was to be stopped)."""
    whole = SequenceOutput(0, [1], params, tokenizer)
    pieces = SequenceOutput(0, [1], params, tokenizer)
    joined = CompletionOutput(index=0)
    stop_core = False
    for index, chunk in enumerate(chunks):
        is_last = index == len(chunks) - 1
        update = SequenceUpdate(
            request_id="r",
            new_token_ids=chunk,
            finish_reason=finish if is_last else None,
            stop_reason=stop_reason if is_last else None,
        )
        stop_core = whole.add(update)
        pieces.add(update)
        if pieces.has_news:
            delta = pieces.take_delta()
            joined.text += delta.text
            joined.token_ids += delta.token_ids
            joined.finish_reason, joined.stop_reason = delta.finish_reason, delta.stop_reason
        if whole.is_finished:
            break
    return whole.snapshot(), joined, stop_core


def cuts(data: list[int]) -> Iterator[list[list[int]]]:
    """All ways to cut the tokens into updates."""
    for marks in itertools.product([False, True], repeat=len(data) - 1):
        chunks = [[data[0]]]
        for token, mark in zip(data[1:], marks, strict=True):
            if mark:
                chunks.append([token])
            else:
                chunks[-1].append(token)
        yield chunks


@pytest.mark.parametrize(
    ("include", "text"), [(False, "one t"), (True, "one two")], ids=["cut", "included"]
)
def test_a_stop_string_over_token_borders(tokenizer: Tokenizer, include: bool, text: str) -> None:
    params = SamplingParams(stop=["xyz", "wo"], include_stop_str_in_output=include)
    tokens = list(b"one two th")
    for chunks in cuts(tokens):
        whole, joined, stop_core = run(tokenizer, params, chunks)
        assert whole == joined
        assert whole.text == text
        assert whole.token_ids == list(b"one two")
        assert (whole.finish_reason, whole.stop_reason) == ("stop", "wo")
        in_last_chunk = sum(map(len, chunks[:-1])) < len(b"one two")
        assert stop_core == (not in_last_chunk), "a core that has ended needs no word"


def test_text_that_could_have_become_a_stop_string_is_given_at_the_end(
    tokenizer: Tokenizer,
) -> None:
    params = SamplingParams(stop=["abcd"])
    whole, joined, _ = run(tokenizer, params, [[c] for c in b"xabc"])
    assert whole == joined
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("xabc", "length", None)


def test_no_stop_string_counts_before_min_tokens(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=["a"], min_tokens=3)
    whole, joined, _ = run(tokenizer, params, [[c] for c in b"aaaaa"])
    assert whole == joined
    assert (whole.text, whole.token_ids) == ("aaa", list(b"aaaa"))


@pytest.mark.parametrize(
    ("params", "token", "text"),
    [
        ({"stop_token_ids": [99]}, 99, "ab"),
        ({"stop_token_ids": [99], "include_stop_str_in_output": True}, 99, "abc"),
        ({}, EOS, "ab"),
        ({"skip_special_tokens": False}, EOS, "ab"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, EOS, "ab<eos>"),
    ],
)
def test_the_token_that_ends_is_kept_but_not_shown(
    tokenizer: Tokenizer, params: dict, token: int, text: str
) -> None:
    stop_reason = None if token == EOS else token
    whole, joined, stop_core = run(
        tokenizer,
        SamplingParams(**params),
        [[97], [98], [token]],
        finish="stop",
        stop_reason=stop_reason,
    )
    assert whole == joined
    assert (whole.text, whole.token_ids, whole.stop_reason) == (text, [97, 98, token], stop_reason)
    assert not stop_core


def test_special_tokens_in_the_middle(tokenizer: Tokenizer) -> None:
    chunks = [[97], [257], [98]]
    assert run(tokenizer, SamplingParams(), chunks)[0].text == "ab"
    shown = SamplingParams(skip_special_tokens=False)
    assert run(tokenizer, shown, chunks)[0].text == "a<b>b"


def test_without_detokenization_there_is_no_text(tokenizer: Tokenizer) -> None:
    whole, _, _ = run(tokenizer, SamplingParams(detokenize=False), [[97], [98]])
    assert (whole.text, whole.token_ids) == ("", [97, 98])


def test_abort_gives_what_was_held_back(tokenizer: Tokenizer) -> None:
    sequence = SequenceOutput(0, [1], SamplingParams(stop=["abc"]), tokenizer)
    sequence.add(SequenceUpdate(request_id="r", new_token_ids=[97, 98]))
    assert sequence.take_delta().text == ""
    sequence.abort()
    last = sequence.take_delta()
    assert (last.text, last.finish_reason) == ("ab", "abort")


@given(
    data=st.lists(st.integers(0, 258), min_size=1, max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    include=st.booleans(),
    random=st.randoms(),
)
def test_any_cut_of_any_bytes_gives_the_same(
    tokenizer: Tokenizer, data: list[int], stop: list[str], include: bool, random
) -> None:
    params = SamplingParams(stop=stop, include_stop_str_in_output=include)
    one_by_one = run(tokenizer, params, [[token] for token in data])[0]
    chunks: list[list[int]] = [[]]
    for token in data:
        chunks[-1].append(token)
        if random.random() < 0.5:
            chunks.append([])
    whole, joined, _ = run(tokenizer, params, chunks)
    assert whole == joined == one_by_one
    if one_by_one.finish_reason == "length":
        assert whole.text == tokenizer.decode(data)


@given(data=st.binary(min_size=1, max_size=12), cut=st.integers(0, 11))
def test_the_short_way_gives_the_same_text(tokenizer: Tokenizer, data: bytes, cut: int) -> None:
    """Without stop strings and log-probabilities tokens take a shorter way through the code."""
    ids = list(data)
    chunks = [chunk for chunk in (ids[:cut], ids[cut:]) if chunk]
    plain = SamplingParams(max_tokens=20)
    long_way = SamplingParams(max_tokens=20, stop=["\x01 never \x01"])
    expected = run(tokenizer, long_way, chunks)
    assert run(tokenizer, plain, chunks) == expected
    assert run(tokenizer, plain, [[one] for one in ids]) == expected


@pytest.mark.parametrize("num_in_prompt", [1, 2, 3])
def test_a_character_that_the_prompt_began(tokenizer: Tokenizer, num_in_prompt: int) -> None:
    """One token is one byte here, so the prompt's last three count."""
    begun, rest = "x😀".encode()[: 1 + num_in_prompt], "😀".encode()[num_in_prompt:]
    output = SequenceOutput(0, [*begun], SamplingParams(), tokenizer)
    output.add(
        SequenceUpdate(request_id="r", new_token_ids=[*rest, ord("a")], finish_reason="length")
    )
    assert output.snapshot().text == "😀a"


def test_every_token_has_its_log_probability(tokenizer: Tokenizer) -> None:
    output = SequenceOutput(0, [1], SamplingParams(logprobs=0), tokenizer)
    for token, finish in ((97, None), (98, None), (99, "length")):
        entry = TokenLogprobs([token], [-token / 100], 1)
        output.add(
            SequenceUpdate(
                request_id="r", new_token_ids=[token], logprobs=[entry], finish_reason=finish
            )
        )
    whole = output.snapshot()
    assert [list(values) for values in whole.logprobs or []] == [[97], [98], [99]]
    assert whole.cumulative_logprob == pytest.approx(-2.94)
