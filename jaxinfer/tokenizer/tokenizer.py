"""Text <-> token ids for one model, and its chat template. The face of this package.

Knows what a model directory or GGUF file says of its tokens; knows nothing of requests' progress
(detokenizer.py), of the engine, or of HTTP. Light on purpose: the HTTP process imports it, so
transformers is imported only for directories without a tokenizer.json.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.core.sampling_params import model_defaults
from jaxinfer.errors import CheckpointError, ConfigError, RequestError
from jaxinfer.tokenizer.chat_template import ChatTemplate, compile_chat_template
from jaxinfer.tokenizer.decoding import (
    DecoderKind,
    byte_level_bytes,
    fallback_byte,
    find_decoder_rule,
)
from jaxinfer.tokenizer.gguf_tokenizer import load_gguf_tokenizer
from jaxinfer.tokenizer.hf_files import load_hf_tokenizer
from jaxinfer.tokenizer.source import TokenizerSource

# What word-piece decoding leaves a space before, and what English puts there (transformers'
# clean_up_tokenization): applied in this order.
_CLEAN_UPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def load_tokenizer(path: str | Path, *, chat_template: str | None = None) -> "Tokenizer":
    """The tokenizer of a Hugging Face directory or a .gguf file.

    `chat_template` replaces the model's: a file, the name of one of its templates, or the Jinja
    text itself. Raises CheckpointError for a path that holds no usable tokenizer and ConfigError
    for a template that is no file and no template.
    """
    path = Path(path)
    if path.is_dir():
        source = load_hf_tokenizer(path)
    elif path.suffix == ".gguf":
        source = load_gguf_tokenizer(path)
    else:
        raise CheckpointError(
            f"tokenizer={str(path)!r} is neither a directory with tokenizer.json nor a .gguf file."
        )
    return Tokenizer(source, chat_template=chat_template)


class Tokenizer:
    """Encodes, decodes and renders as transformers' AutoTokenizer does for the same files.

    Thread-safe: nothing changes after construction but caches.
    """

    def __init__(self, source: TokenizerSource, *, chat_template: str | None = None) -> None:
        self._backend = source.backend
        self._named_tokens = source.named_tokens
        self._generation_config = source.generation_config
        self._clean_up_spaces = source.clean_up_spaces
        self._templates = source.chat_templates
        self._default_template = (
            _read_template(chat_template, source.chat_templates) if chat_template else None
        )
        if chat_template and self._default_template is not None:
            _check_template(chat_template, self._default_template)  # fails at start-up
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._added_texts = {id_: token.content for id_, token in added.items()}
        self.decoder_rule = find_decoder_rule(self._backend)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: int | None = self._named_id("bos_token")
        self.eos_token_ids: tuple[int, ...] = self._find_eos_ids(source.generation_eos_ids)
        self._bytes_cache: dict[int, bytes] = {}
        self._text_cache: dict[int, str] = {}

    def _named_id(self, name: str) -> int | None:
        text = self._named_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _find_eos_ids(self, generation_ids: Iterable[int]) -> tuple[int, ...]:
        own = self._named_id("eos_token")
        ids = [] if own is None else [own]
        return tuple(dict.fromkeys([*ids, *generation_ids]))  # unique, the tokenizer's first

    # -- text and ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises RequestError for text that is not valid Unicode."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what the Rust library says of a str that has no UTF-8
            position = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if position is None:
                raise
            raise RequestError(
                f"The text is not valid Unicode: a lone surrogate at character {position}.",
                param="prompt",
            ) from error

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of token ids; ids outside the vocabulary count as nothing, broken UTF-8 as U+FFFD.

        `spaces_between_special_tokens` matters to decoders that put spaces between words only.
        """
        try:
            text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:  # an id is kept in 32 unsigned bits
            raise RequestError(
                "token ids must be between 0 and 2**32 - 1.", param="tokens"
            ) from error
        if self._clean_up_spaces:
            for spaced, clean in _CLEAN_UPS:
                text = text.replace(spaced, clean)
        if not (skip_special_tokens or spaces_between_special_tokens):
            text = self._join_special(text, ids)
        return text

    def _join_special(self, text: str, ids: Sequence[int]) -> str:
        """Removes the space that the decoder put between neighbouring added tokens."""
        if self.decoder_rule.kind is not DecoderKind.OTHER:
            return text
        for left_id, right_id in zip(ids[:-1], ids[1:], strict=True):
            left, right = self._added_texts.get(left_id), self._added_texts.get(right_id)
            if left is not None and right is not None:
                text = text.replace(f"{left} {right}", left + right, 1)
        return text

    # -- single tokens

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None outside the vocabulary."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def token_text(self, token_id: int) -> str:
        """The token decoded alone, as logprobs show it: part of a character is U+FFFD."""
        text = self._text_cache.get(token_id)
        if text is None:
            if self.token_piece(token_id) is None:
                return ""
            text = self._text_cache[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the token adds to a text (empty outside the vocabulary)."""
        found = self._bytes_cache.get(token_id)
        if found is None:
            piece = self.token_piece(token_id)
            if piece is None:
                return b""
            found = self._bytes_cache[token_id] = self._find_bytes(token_id, piece)
        return found

    def _find_bytes(self, token_id: int, piece: str) -> bytes:
        if self.decoder_rule.kind is DecoderKind.BYTE_LEVEL:
            return byte_level_bytes(piece)
        if self.decoder_rule.kind is DecoderKind.SENTENCEPIECE:
            byte = fallback_byte(piece)
            return bytes([byte]) if byte is not None else piece.replace("▁", " ").encode()
        return self.token_text(token_id).encode()

    # -- chat

    @property
    def has_chat_template(self) -> bool:
        return self._default_template is not None or bool(self._templates)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text; encode it with `add_special_tokens=False`.

        `chat_template` is Jinja text or the name of one of the model's templates. Raises
        RequestError when there is no template, or it is broken or refuses the messages.
        """
        template = self._choose_template(chat_template, has_tools=tools is not None)
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            variables={**self._named_tokens, **(template_kwargs or {})},
        )

    def _choose_template(self, requested: str | None, *, has_tools: bool) -> ChatTemplate:
        if requested is not None:
            text = self._templates.get(requested, requested)
        elif self._default_template is not None:
            text = self._default_template
        elif has_tools and "tool_use" in self._templates:
            text = self._templates["tool_use"]
        elif "default" in self._templates:
            text = self._templates["default"]
        elif self._templates:
            raise RequestError(
                "The model has several chat templates and no default: chat_template must be one "
                f"of {sorted(self._templates)}.",
                param="chat_template",
            )
        else:
            raise RequestError(
                "The model has no chat template: give the server one with --chat-template, or "
                "use /v1/completions.",
                param="messages",
            )
        try:
            return compile_chat_template(text)
        except ConfigError as error:
            raise RequestError(str(error), param="chat_template") from error

    # -- what else the files say

    def sampling_defaults(self) -> dict[str, Any]:
        """The sampling fields of generation_config.json, {} without one."""
        return model_defaults(self._generation_config)

    def save_json(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

        transformers and `load_tokenizer` read the same tokenizer from them.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": self._clean_up_spaces,
            **self._named_tokens,
        }
        templates = dict(self._templates)
        if self._default_template is not None:
            templates["default"] = self._default_template
        if list(templates) == ["default"]:
            config["chat_template"] = templates["default"]
        elif templates:
            config["chat_template"] = [
                {"name": name, "template": text} for name, text in templates.items()
            ]
        _write_json(directory / "tokenizer_config.json", config)
        generation = {**self._generation_config, "eos_token_id": list(self.eos_token_ids)}
        _write_json(directory / "generation_config.json", generation)


def _read_template(value: str, templates: Mapping[str, str]) -> str:
    """--chat-template: a file, a template's name, or Jinja text (known by its braces)."""
    if value in templates:
        return templates[value]
    if any(mark in value for mark in ("{{", "{%", "\n")):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template={value!r} is no readable file "
            f"({error.strerror if isinstance(error, OSError) else error}), no template of the "
            f"model ({', '.join(sorted(templates)) or 'it has none'}) and no Jinja text. Give the "
            "path of a .jinja file."
        ) from error


def _check_template(value: str, text: str) -> None:
    """Raises ConfigError that names the flag's value, not the template's whole text."""
    try:
        compile_chat_template(text)
    except ConfigError as error:
        shown = value if len(value) <= 100 else value[:100] + "…"
        raise ConfigError(f"chat_template={shown!r}: {error}") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
