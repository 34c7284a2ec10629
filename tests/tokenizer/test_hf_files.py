"""What is read from a Hugging Face directory, against transformers where it reads the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from jaxinfer.errors import CheckpointError
from jaxinfer.tokenizer.tokenizer import load_tokenizer
from tests.tokenizer.makers import byte_level, save, word_piece


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, (1,)),
        ({"eos_token_id": 5}, None, (1, 5)),
        ({"eos_token_id": [1, 7, 5]}, {"eos_token_id": 9}, (1, 7, 5)),
        ({"temperature": 0.6}, {"eos_token_id": [8]}, (1, 8)),
        (None, {"eos_token_id": 1}, (1,)),
    ],
)
def test_eos_token_ids(tmp_path: Path, generation: Any, config: Any, expected: Any) -> None:
    save(byte_level(), tmp_path)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            write(tmp_path / name, value)
    assert load_tokenizer(tmp_path).eos_token_ids == expected


def test_sampling_defaults(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    assert load_tokenizer(tmp_path).sampling_defaults() == {}
    generation = {"temperature": 0.6, "top_p": None, "top_k": 20, "do_sample": True}
    write(tmp_path / "generation_config.json", generation)
    assert load_tokenizer(tmp_path).sampling_defaults() == {"temperature": 0.6, "top_k": 20}


TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    "config",
    [
        {"pad_token": "<pad>"},
        {"pad_token": {"__type": "AddedToken", "content": "<pad>", **TOKEN}},
        {"extra_special_tokens": ["<x1>", "<x2>"]},
        {"additional_special_tokens": ["<x1>"]},
        {"extra_special_tokens": {"image_token": "<image>"}, "chat_template": "{{ image_token }}"},
        {"image_token": "<image>", "chat_template": "{{ image_token }}{{ pad_token }}"},
        {
            "added_tokens_decoder": {
                "1": {"content": "</s>", "special": True, **TOKEN},
                "402": {"content": "<late>", "special": True, **TOKEN, "lstrip": True},
                "403": {"content": "<plain>", "special": False, **TOKEN},
            }
        },
        {"add_bos_token": False},
    ],
)
def test_tokens_named_in_the_config(tmp_path: Path, config: dict[str, Any]) -> None:
    save(byte_level(), tmp_path, **config)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    text = "a<pad> <x1><x2> <image>b  <late> <plain></s>"
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.vocab_size == len(theirs)
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == expected
    if "chat_template" in config:
        chat = [{"role": "user", "content": "x"}]
        assert ours.render_chat(chat) == theirs.apply_chat_template(chat, tokenize=False)


def test_legacy_special_tokens_map(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path / "special_tokens_map.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>", **TOKEN}},
    )
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_ids) == (0, (1,))


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    save(tokenizer, tmp_path)
    ids = load_tokenizer(tmp_path).encode("a long text of many tokens")
    assert ids == byte_level().encode("a long text of many tokens").ids


def test_spaces_are_cleaned_up_for_word_pieces_only(tmp_path: Path) -> None:
    for name, make in (("words", word_piece), ("bytes", byte_level)):
        directory = save(make(), tmp_path / name, clean_up_tokenization_spaces=True)
        ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(str(directory))
        ids = ours.encode("it doesn't jump , does it ?")
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ("jump," in ours.decode(ids)) == (name == "words")


def test_chat_template_files(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "x"}]
    listed = [{"name": "default", "template": "LIST"}, {"name": "tool_use", "template": "TOOL"}]
    save(byte_level(), tmp_path, chat_template=listed)
    assert load_tokenizer(tmp_path).render_chat(chat) == "LIST"
    assert load_tokenizer(tmp_path).render_chat(chat, tools=[]) == "TOOL"
    write(tmp_path / "chat_template.json", {"chat_template": "JSON"})
    assert load_tokenizer(tmp_path).render_chat(chat) == "JSON"
    write(tmp_path / "chat_template.jinja", "FILE")
    write(tmp_path / "additional_chat_templates" / "rag.jinja", "RAG")
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    assert ours.render_chat(chat) == "FILE"
    assert ours.render_chat(chat, chat_template="rag") == "RAG"
    assert theirs.apply_chat_template(chat, chat_template="rag", tokenize=False) == "RAG"


def test_vocab_and_merges_without_tokenizer_json(tmp_path: Path) -> None:
    model = json.loads(byte_level().to_str())["model"]
    write(tmp_path / "vocab.json", model["vocab"])
    write(tmp_path / "merges.txt", "\n".join(" ".join(merge) for merge in model["merges"]))
    write(tmp_path / "config.json", {"model_type": "gpt2"})
    write(tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "unk_token": "<unk>"})
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    text = "Hello, it's 12.5</s>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_token_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"vocab.json": "{"}, "transformers cannot make a tokenizer"),
        ({"tokenizer.json": "{"}, "tokenizer.json is no tokenizer"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[1]"}, "must hold a JSON object"),
        (
            {"tokenizer.json": None, "generation_config.json": "{"},
            "generation_config.json cannot be read as JSON",
        ),
    ],
)
def test_unusable_directories(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    for name, text in files.items():
        if text is None:
            byte_level().save(str(tmp_path / name))
        else:
            write(tmp_path / name, text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_path_that_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a directory"):
        load_tokenizer(tmp_path / "nothing")


def test_saved_files_give_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    listed = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    first = load_tokenizer(save(tokenizer, tmp_path / "a", chat_template=listed))
    first.save_json(tmp_path / "b")
    second = load_tokenizer(tmp_path / "b")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "b"))
    text = "Hello<|end|> </s> 12"
    assert first.encode(text) == second.encode(text) == theirs.encode(text)
    assert second.eos_token_ids == first.eos_token_ids
    chat = [{"role": "user", "content": "x"}]
    assert second.render_chat(chat, chat_template="rag") == "R"
    assert theirs.apply_chat_template(chat, tokenize=False) == "D"
