"""GGUF metadata -> tokenizer, with files written by the gguf package."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from jaxinfer.errors import CheckpointError
from jaxinfer.tokenizer.gguf_pretokenizers import find_rule
from jaxinfer.tokenizer.gguf_tokenizer import source_from_metadata
from jaxinfer.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.makers import BYTES, byte_level, sentencepiece_bpe

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def tokens_of(backend: Backend) -> list[str]:
    return [backend.id_to_token(i) or "" for i in range(backend.get_vocab_size())]


def byte_level_metadata(pre: str = "gpt-2") -> dict[str, Any]:
    backend = byte_level()
    tokens = tokens_of(backend)
    added = backend.get_added_tokens_decoder()
    types = [
        NORMAL if i not in added else CONTROL if added[i].special else USER
        for i in range(len(tokens))
    ]
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ bos_token }}chat",
        "tokenizer.chat_template.tool_use": "tools",
    }


def sentencepiece_metadata() -> dict[str, Any]:
    """Scores as SentencePiece BPE has them: the earlier the merge, the higher."""
    backend = sentencepiece_bpe()
    tokens = tokens_of(backend)
    merges = json.loads(backend.to_str())["model"]["merges"]
    rank = {"".join(merge): index for index, merge in enumerate(merges)}
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL} | dict.fromkeys(BYTES, BYTE)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank.get(token, 10_000)) for token in tokens],
        "tokenizer.ggml.token_type": [kinds.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2**32 - 1,
    }


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(max_size=30) | st.sampled_from(["a<s>b <tool>", "Hello world 12", " x  y"]))
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_tokens_are_those_of_the_original(kind: str, text: str) -> None:
    original, ours = ORIGINALS[kind]
    ids = original.encode(text).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids, skip_special_tokens=False) == original.decode(
        ids, skip_special_tokens=False
    )


ORIGINALS = {
    "byte_level": (byte_level(), Tokenizer(source_from_metadata(byte_level_metadata()))),
    "sentencepiece": (
        sentencepiece_bpe(),
        Tokenizer(source_from_metadata(sentencepiece_metadata())),
    ),
}


def test_what_the_file_says(tmp_path: Path) -> None:
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", byte_level_metadata()))
    assert ours.eos_token_ids == (1, 2)
    assert ours.bos_token_id == 0
    shown = ours.encode("<tool></s>", add_special_tokens=False)
    assert [ours.is_special(token_id) for token_id in shown] == [False, True]
    assert ours.decode(shown) == "<tool>"
    assert ours.sampling_defaults() == {}
    chat = [{"role": "user", "content": "x"}]
    assert ours.render_chat(chat) == "<s>chat"
    assert ours.render_chat(chat, tools=[]) == "tools"
    ours.save_json(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.encode("Hello </s> 12") == ours.encode("Hello </s> 12")
    assert saved.eos_token_ids == ours.eos_token_ids
    assert saved.render_chat(chat) == "<s>chat"


def test_bos_and_eos_flags() -> None:
    metadata = byte_level_metadata() | {
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }
    ids = Tokenizer(source_from_metadata(metadata)).encode("a")
    assert ids[0] != 0
    assert ids[-1] == 1
    del metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]
    assert Tokenizer(source_from_metadata(metadata)).encode("a") == ids[:-1]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "it's  1234 a\n\nb!", ["it", "'s", " ", " 1234", " a", "\n", "\n", "b", "!"]),
        ("smollm", "a 12b", ["a", " ", "1", "2", "b"]),
        ("llama-bpe", "I'LL 12345\n\n x", ["I", "'LL", " ", "123", "45", "\n\n", " x"]),
        ("qwen2", "I'LL 12 x.\n", ["I", "'LL", " ", "1", "2", " x", ".\n"]),
        ("tekken", "HelloWorld ABCd 12/\n", ["Hello", "World", " ABCd", " ", "1", "2", "/\n"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", " ", "123", "4"]),
        ("deepseek-v3", "x=日本語 1234,a", ["x", "=", "日本語", " ", "123", "4", ",a"]),
    ],
)
def test_pre_tokenizers_split(pre: str, text: str, words: list[str]) -> None:
    spans = [span for _, span in find_rule(pre).build().pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "never-heard"}, "tokenizer.ggml.pre='never-heard'.*--tokenizer"),
        ({"pre": None}, "tokenizer.ggml.pre=None"),
        ({"model": "t5"}, "tokenizer.ggml.model='t5'"),
        ({"tokens": ["a", "a"]}, "a token twice"),
        ({"merges": ["zz yy"]}, "merges do not fit"),
        ({"merges": ["zz"]}, "merges do not fit"),
        ({"token_type": [1]}, "1 tokenizer.ggml.token_type for 402 tokens"),
        ({"eos_token_id": 999}, "eos_token_id=999 is not in its vocabulary"),
        ({"model": "llama", "scores": [1.0]}, "1 tokenizer.ggml.scores for 402 tokens"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
    ],
)
def test_unusable_metadata(change: dict[str, Any], message: str) -> None:
    changed = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(CheckpointError, match=message):
        source_from_metadata(byte_level_metadata() | changed)


def test_file_without_a_tokenizer() -> None:
    with pytest.raises(CheckpointError, match="no tokenizer.ggml.tokens"):
        source_from_metadata({"general.architecture": "llama"})
