"""What a tokenizer is made of, wherever it was read from. Knows no files."""

from dataclasses import dataclass, field
from typing import Any

import tokenizers


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """The parts that files (Hugging Face directory, GGUF) give."""

    backend: tokenizers.Tokenizer  # added tokens included; no truncation, no padding
    named_tokens: dict[str, str]  # "bos_token", "eos_token", ... -> text
    generation_eos_ids: tuple[int, ...] = ()  # ends of generation beside the eos token
    chat_templates: dict[str, str] = field(default_factory=dict)  # by name; "default"
    generation_config: dict[str, Any] = field(default_factory=dict)
    clean_up_spaces: bool = False  # undo the spaces that word-piece decoding puts in
