"""The embedded model's tokenizer, from its GGUF file; expected ids are the Hugging Face ones."""

from pathlib import Path

import pytest

from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.model

PAGE = (
    "Chapter 12: In 2024 the price rose 3.14159 % -- to $1,234,567.89!\n\n"
    "def f(x: int) -> str:\n\treturn f'{x!r}'  # it's  'quoted'\n"
    "Emoji 😀👨‍👩‍👧🏽 and naïve façade, Ελληνικά, русский, 日本語の文章, ไทย, العربية.\r\n   end"
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        (" ", [216]),
        ("Hello, how are you?", [19556, 28, 638, 359, 346, 47]),
        ('_["G', [79, 2790, 55]),
        ("The year 2024", [504, 713, 216, 34, 32, 34, 36]),
        ("def f(x):\n    return x**2\n", [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198]),
        (
            "<|im_start|>user\nHello, how are you?<|im_end|>\n<|im_start|>assistant\n",
            [1, 4093, 198, 19556, 28, 638, 359, 346, 47, 2, 198, 1, 520, 9531, 198],
        ),
    ],
)
def test_known_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_facts(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.bos_token_id == 1
    assert [i for i in range(49152) if tokenizer.is_special(i)] == list(range(17))
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.token_text(346) == " you"
    assert tokenizer.decode([2, 346]) == " you"


def test_a_page_comes_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PAGE)
    assert tokenizer.decode(ids) == PAGE
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == PAGE
    digits = [
        tokenizer.token_text(i) for i in ids if any(c.isdigit() for c in tokenizer.token_text(i))
    ]
    assert "".join(digits) == "".join(c for c in PAGE if c.isdigit())
    assert all(len(text) == 1 for text in digits)


def test_a_page_streams(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PAGE)
    for size in (1, 2, 3, 7, len(ids)):
        stream = IncrementalDetokenizer(tokenizer, [1, 4093, 198])
        pieces = [stream.append(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join(pieces) + stream.finish() == PAGE
        assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_in_logprobs(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    assert tokenizer.token_text(ids[0]) == "\ufffd"
    assert b"".join(map(tokenizer.token_bytes, ids)) == "😀".encode()


def test_chat(tokenizer: Tokenizer) -> None:
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(question) == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *question]
    assert tokenizer.render_chat(parts, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    )
