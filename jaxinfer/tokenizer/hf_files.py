"""Reads a Hugging Face tokenizer directory. Knows its files; knows nothing of GGUF or serving.

Follows transformers 5: tokenizer.json is the truth for how text is split and which BOS/EOS
`encode` adds (its post-processor; `add_bos_token` in tokenizer_config.json does not count beside
it); tokenizer_config.json, or special_tokens_map.json in old checkpoints, names the special
tokens; chat_template.jinja and additional_chat_templates/ win over tokenizer_config.json.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from jaxinfer.errors import CheckpointError
from jaxinfer.tokenizer.source import TokenizerSource

_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA_KEYS = ("extra_special_tokens", "additional_special_tokens")
# What transformers can make a tokenizer of. Without any, it need not be imported (seconds).
_CONVERTIBLE_FILES = (
    "tokenizer.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_ADDED_TOKEN_FIELDS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_hf_tokenizer(directory: Path) -> TokenizerSource:
    """Reads `directory`; raises CheckpointError when no tokenizer can be made of it."""
    config = _read_object(directory / "tokenizer_config.json")
    if (directory / "tokenizer.json").is_file():
        backend = _read_backend(directory / "tokenizer.json")
    else:
        backend, config = _convert_with_transformers(directory, config)
    if "added_tokens_decoder" not in config:
        config |= _read_object(directory / "special_tokens_map.json")
    _add_configured_tokens(backend, config)
    backend.no_truncation()
    backend.no_padding()
    generation = _read_object(directory / "generation_config.json")
    return TokenizerSource(
        backend=backend,
        named_tokens=_named_tokens(config),
        generation_eos_ids=_generation_eos_ids(directory, generation),
        chat_templates=_read_chat_templates(directory, config),
        generation_config=generation,
        clean_up_spaces=bool(config.get("clean_up_tokenization_spaces", False))
        and not isinstance(backend.model, tokenizers.models.BPE),
    )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON: {error}. Repair it or download the model again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, not {type(value).__name__}. Repair it or download "
            "the model again."
        )
    return value


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (the Rust library raises bare Exception)
        raise CheckpointError(
            f"{path} is no tokenizer that can be read: {error}. Download the model again, or name "
            "another tokenizer with --tokenizer."
        ) from error


def _convert_with_transformers(
    directory: Path, config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """For sentencepiece and tiktoken files, and vocab.json + merges.txt: transformers converts.

    The returned config names the special tokens that the tokenizer's class brings along.
    """
    if not any(any(directory.glob(pattern)) for pattern in _CONVERTIBLE_FILES):
        raise CheckpointError(
            f"{directory} has no tokenizer: no tokenizer.json and none of "
            f"{', '.join(_CONVERTIBLE_FILES)}. Name a directory that has one with --tokenizer."
        )
    from transformers import AutoTokenizer, TokenizersBackend

    try:
        converted = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory} has no tokenizer.json, and transformers cannot make a tokenizer of it: "
            f"{' '.join(str(error).split())} Name another tokenizer with --tokenizer."
        ) from error
    if not isinstance(converted, TokenizersBackend):
        raise CheckpointError(
            f"{directory} has no tokenizer.json and its {type(converted).__name__} cannot be "
            "converted to one. Name another tokenizer with --tokenizer."
        )
    return converted.backend_tokenizer, converted.special_tokens_map | config


def _as_added_token(value: str | dict[str, Any], *, special: bool) -> AddedToken:
    """A token entry of the JSON files: its text, or an object with flags."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {key: value[key] for key in _ADDED_TOKEN_FIELDS if key in value}
    flags["special"] = special or bool(value.get("special", False))
    return AddedToken(value["content"], **flags)


def _text_of(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return value["content"]
    return None


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Standard names first; a model's own ("image_token") are names for templates as well."""
    own = [key for key in config if key.endswith("_token") and key not in _TOKEN_NAMES]
    named = {name: _text_of(config.get(name)) for name in (*_TOKEN_NAMES, *own)}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= {name: _text_of(value) for name, value in extra.items()}
    return {name: text for name, text in named.items() if text is not None}


def _add_configured_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Adds tokens that tokenizer_config.json names and tokenizer.json does not have."""
    known = backend.get_added_tokens_decoder().values()
    known_forms = {repr(token) for token in known}
    known_texts = {token.content for token in known}
    missing: dict[str, AddedToken] = {}
    decoder = config.get("added_tokens_decoder", {})
    for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        token = _as_added_token(entry, special=False)
        if repr(token) not in known_forms:
            missing[token.content] = token
    wanted: list[Any] = [config.get(name) for name in _named_tokens(config) if name in config]
    for key in _EXTRA_KEYS:
        extra = config.get(key) or []
        wanted += list(extra.values()) if isinstance(extra, dict) else extra
    for value in wanted:
        text = _text_of(value)
        if text and text not in known_texts and text not in missing:
            missing[text] = _as_added_token(value, special=True)
    if missing:
        backend.add_tokens(list(missing.values()))


def _as_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, list):
        return tuple(item for item in value if isinstance(item, int))
    return ()


def _generation_eos_ids(directory: Path, generation: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json decides; config.json stands in for it only where it says nothing.

    Fine-tunes often keep a stale `eos_token_id` in config.json that is an ordinary token of
    theirs, so the two are not merged (vLLM does the same).
    """
    ids = _as_ids(generation.get("eos_token_id"))
    if ids:
        return ids
    config = _read_object(directory / "config.json")
    return _as_ids(config.get("eos_token_id"))


def _read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> template, from the first of the three places that has any."""
    files = {
        path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))
    }
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    value = _read_object(directory / "chat_template.json").get("chat_template")
    value = value or config.get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):  # [{"name": ..., "template": ...}, ...]
        return {entry["name"]: entry["template"] for entry in value}
    if isinstance(value, dict):
        return dict(value)
    return {}
