"""Encoding and decoding against transformers, on the same files."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.errors import RequestError
from jaxinfer.tokenizer.bad_words import bad_words_to_token_ids
from tests.tokenizer.conftest import Pair

TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345.",
    "  two  spaces and a\ttab\n\n",
    "<s>special</s> in <tool> text two words",
    "naïve 😀👨‍👩‍👧 日本語 ก็ é",
]
FAST = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("add_special", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers(pair: Pair, text: str, add_special: bool) -> None:
    expected = pair.theirs.encode(text, add_special_tokens=add_special)
    assert pair.ours.encode(text, add_special_tokens=add_special) == expected


@FAST
@given(text=st.text(max_size=40))
def test_encodes_any_text_as_transformers(pair: Pair, text: str) -> None:
    assert pair.ours.encode(text) == pair.theirs.encode(text)


@FAST
@given(seeds=st.lists(st.integers(0, 10_000), max_size=12), skip=st.booleans())
def test_decodes_any_ids_as_transformers(pair: Pair, seeds: list[int], skip: bool) -> None:
    ids = [seed % pair.ours.vocab_size for seed in seeds]
    expected = pair.theirs.decode(ids, skip_special_tokens=skip)
    assert pair.ours.decode(ids, skip_special_tokens=skip) == expected


def test_says_what_the_files_say(pair: Pair) -> None:
    assert pair.ours.vocab_size == len(pair.theirs)
    assert pair.ours.bos_token_id == pair.theirs.bos_token_id
    assert pair.ours.eos_token_ids == (pair.theirs.eos_token_id,)
    specials = {i for i in range(pair.ours.vocab_size) if pair.ours.is_special(i)}
    assert specials == set(pair.theirs.all_special_ids)


def test_token_text_is_the_token_decoded_alone(pair: Pair) -> None:
    for token_id in range(pair.ours.vocab_size):
        expected = pair.theirs.decode([token_id], skip_special_tokens=False)
        assert pair.ours.token_text(token_id) == expected


def test_ids_outside_the_vocabulary_are_nothing(pair: Pair) -> None:
    beyond = pair.ours.vocab_size + 5
    assert pair.ours.decode([beyond]) == ""
    assert pair.ours.token_text(beyond) == ""
    assert pair.ours.token_bytes(beyond) == b""
    assert pair.ours.token_bytes(-1) == b""
    assert pair.ours.token_text(-1) == ""


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_no_strip"])
def test_token_bytes_add_up_to_the_text(pairs: dict[str, Pair], name: str) -> None:
    ours = pairs[name].ours
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert b"".join(map(ours.token_bytes, ids)).decode() == text


def test_ids_that_cannot_be(pair: Pair) -> None:
    for token_id in (-1, 2**32):
        with pytest.raises(RequestError, match="between 0 and"):
            pair.ours.decode([token_id])


def test_lone_surrogate_is_the_callers_fault(pair: Pair) -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        pair.ours.encode("a\ud800")


def test_spaces_between_special_tokens(pairs: dict[str, Pair]) -> None:
    ours = pairs["word_piece"].ours
    ids = ours.encode("fox</s></s></s>dog", add_special_tokens=False)
    spaced = ours.decode(ids, skip_special_tokens=False)
    joined = ours.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert "</s> </s> </s>" in spaced
    assert joined == spaced.replace("</s> </s> </s>", "</s></s></s>")


def test_bad_words_with_and_without_space(pairs: dict[str, Pair]) -> None:
    ours = pairs["byte_level"].ours
    words = ["fox", " the", "q"]
    sequences = bad_words_to_token_ids(words, ours)
    texts = [ours.decode(ids) for ids in sequences]
    assert set(texts) <= {"fox", " fox", "the", " the", "q", " q"}
    assert {"fox", "the", "q", " the"} <= set(texts)
    for ids in sequences:
        assert ours.encode(ours.decode(ids), add_special_tokens=False) == ids


@pytest.mark.parametrize("word", ["", "  "])
def test_blank_bad_word_is_refused(pairs: dict[str, Pair], word: str) -> None:
    with pytest.raises(RequestError, match="bad_words") as caught:
        bad_words_to_token_ids([word], pairs["byte_level"].ours)
    assert caught.value.param == "bad_words"
