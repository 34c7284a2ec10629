"""Streaming text: every way of cutting the ids gives what decoding them at once gives."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer
from jaxinfer.tokenizer.source import TokenizerSource
from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import Pair
from tests.tokenizer.makers import BYTES

TEXT = "Hello, it's 😀👨‍👩‍👧 日本語 naïve\n\n  x = 12.5</s> ok ก็ end"
SETTINGS = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pieces_of(
    tokenizer: Tokenizer, prompt: Sequence[int], chunks: Sequence[Sequence[int]], *, skip: bool
) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(stream.append(chunk) for chunk in chunks), stream.finish()]


def in_context(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], *, skip: bool
) -> str:
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    both = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    assert both.startswith(before)
    return both[len(before) :]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("prompt_text", ["", "Say: "])
def test_text_in_any_chunks(pair: Pair, prompt_text: str, skip: bool) -> None:
    ours = pair.ours
    prompt = ours.encode(prompt_text)
    ids = ours.encode(TEXT, add_special_tokens=False)
    expected = in_context(ours, prompt, ids, skip=skip)
    for size in range(1, len(ids) + 1):
        chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
        assert "".join(pieces_of(ours, prompt, chunks, skip=skip)) == expected


@SETTINGS
@given(
    seeds=st.lists(st.integers(0, 10_000), max_size=20),
    prompt_text=st.sampled_from(["", "a", "<s>", "Hello wor"]),
    skip=st.booleans(),
)
def test_any_ids_are_exact(pair: Pair, seeds: list[int], prompt_text: str, skip: bool) -> None:
    ours = pair.ours
    ids = [seed % (ours.vocab_size + 1) for seed in seeds]  # one id beyond the vocabulary too
    prompt = ours.encode(prompt_text, add_special_tokens=False)
    expected = in_context(ours, prompt, ids, skip=skip)
    assert "".join(pieces_of(ours, prompt, [[i] for i in ids], skip=skip)) == expected
    assert "".join(pieces_of(ours, prompt, [ids], skip=skip)) == expected


@SETTINGS
@given(text=st.text(max_size=30), prompt_text=st.sampled_from(["", "Hi"]))
def test_any_text_streams(pair: Pair, text: str, prompt_text: str) -> None:
    ours = pair.ours
    prompt = ours.encode(prompt_text)
    ids = ours.encode(text, add_special_tokens=False)
    got = "".join(pieces_of(ours, prompt, [[i] for i in ids], skip=True))
    assert got == in_context(ours, prompt, ids, skip=True)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_never_half_a_character(pairs: dict[str, Pair], name: str) -> None:
    ours = pairs[name].ours
    ids = ours.encode("a😀é☃", add_special_tokens=False)
    pieces = pieces_of(ours, [], [[i] for i in ids], skip=True)
    assert "".join(pieces) == "a😀é☃"
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces_of(ours, [], [[i] for i in ids[:-1]], skip=True)[-1].endswith("\ufffd")


def test_characters_of_byte_level_come_at_once(pairs: dict[str, Pair]) -> None:
    ours = pairs["byte_level"].ours
    ids = ours.encode("😀😀", add_special_tokens=False)
    pieces = pieces_of(ours, [], [[i] for i in ids], skip=True)
    assert [piece for piece in pieces if piece] == ["😀", "😀"]
    assert pieces[-1] == ""


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    first = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_piece(i) == BYTES[0])
    return [first + byte for byte in data]


def test_long_byte_runs_stream_in_whole_characters(pairs: dict[str, Pair]) -> None:
    ours = pairs["sentencepiece"].ours
    text = "ไทย😀" * 20
    pieces = pieces_of(ours, [], [[i] for i in byte_ids(ours, text.encode())], skip=True)
    assert "".join(pieces) == text
    assert len([piece for piece in pieces[:-1] if piece]) >= 5


def test_long_invalid_byte_run_equals_decode(pairs: dict[str, Pair]) -> None:
    ours = pairs["sentencepiece"].ours
    after = ours.encode("ok", add_special_tokens=False)
    ids = byte_ids(ours, b"ab\xff" + b"c" * 60) + after + byte_ids(ours, b"z")
    pieces = pieces_of(ours, [], [[i] for i in ids], skip=True)
    assert "".join(pieces) == ours.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_prompt_that_ends_inside_a_character(pairs: dict[str, Pair], name: str) -> None:
    ours = pairs[name].ours
    if name == "byte_level":
        euro = [
            next(i for i in range(400) if ours.token_bytes(i) == bytes([b]))
            for b in b"\xe2\x82\xac"
        ]
    else:
        euro = byte_ids(ours, "€".encode())
    prompt, rest = euro[:1], euro[1:]
    plain = ours.encode("x", add_special_tokens=False)[-1:]
    finished = "".join(pieces_of(ours, prompt, [[i] for i in [*rest, *plain]], skip=True))
    assert finished == "€x"
    broken = "".join(pieces_of(ours, prompt, [plain], skip=True))
    assert broken == "x"


def test_skipped_special_tokens_do_not_break_a_character(pairs: dict[str, Pair]) -> None:
    ours = pairs["byte_level"].ours
    ids = ours.encode("😀", add_special_tokens=False)
    special = ours.encode("</s>", add_special_tokens=False)
    assert len(ids) > 1
    mixed = [ids[0], *special, *ids[1:]]
    assert "".join(pieces_of(ours, [], [[i] for i in mixed], skip=True)) == "😀"
    shown = "".join(pieces_of(ours, [], [[i] for i in mixed], skip=False))
    assert "</s>" in shown
    assert shown == ours.decode(mixed, skip_special_tokens=False)


def test_window_does_not_grow_with_tokens_that_say_nothing(pairs: dict[str, Pair]) -> None:
    ours = pairs["word_piece"].ours
    nothing = [ours.vocab_size + 1] * 50
    word = ours.encode("fox", add_special_tokens=False)
    stream = IncrementalDetokenizer(ours, [])
    assert stream.append(word) == "fox"
    assert stream.append(nothing) == ""
    assert stream.append(word).strip() == "fox"


def test_window_does_not_wait_for_ever_for_a_character() -> None:
    backend = Backend(models.WordPiece({"<unk>": 0, "\ufffd": 1}, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece()
    ours = Tokenizer(TokenizerSource(backend=backend, named_tokens={}))
    pieces = pieces_of(ours, [], [[1]] * 40, skip=True)
    assert len([piece for piece in pieces[:-1] if piece]) >= 2
    assert "".join(pieces) == ours.decode([1] * 40)


def test_spaces_between_special_tokens(pairs: dict[str, Pair]) -> None:
    ours = pairs["word_piece"].ours
    ids = ours.encode("fox</s></s>", add_special_tokens=False)
    texts = []
    for spaces in (True, False):
        stream = IncrementalDetokenizer(
            ours, [], skip_special_tokens=False, spaces_between_special_tokens=spaces
        )
        texts.append("".join([stream.append([i]) for i in ids]) + stream.finish())
    assert texts == ["fox </s> </s>", "fox </s></s>"]
