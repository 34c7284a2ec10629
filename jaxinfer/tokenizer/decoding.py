"""Which way a tokenizer turns tokens into text, and what bytes one token stands for.

Knows the decoder part of a tokenizer.json; knows no ids, requests or templates.
"""

import enum
import json
from dataclasses import dataclass
from typing import Any

import tokenizers


class DecoderKind(enum.Enum):
    BYTE_LEVEL = enum.auto()  # GPT-2: a token is bytes, spelt in a 256-character alphabet
    SENTENCEPIECE = enum.auto()  # Llama 2: "▁" is a space, "<0x0A>" a byte
    OTHER = enum.auto()  # WordPiece and the like: text depends on the neighbours


@dataclass(frozen=True, kw_only=True)
class DecoderRule:
    kind: DecoderKind
    strips_first_space: bool = False  # SENTENCEPIECE: the whole text loses one leading space


def find_decoder_rule(backend: tokenizers.Tokenizer) -> DecoderRule:
    """The rule of a decoder whose meaning is known exactly, else OTHER."""
    if backend.decoder is None:
        return DecoderRule(kind=DecoderKind.OTHER)
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return DecoderRule(kind=DecoderKind.BYTE_LEVEL)
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and _spells_space(steps[0]):
        if len(steps) == 3:
            return DecoderRule(kind=DecoderKind.SENTENCEPIECE)
        if len(steps) == 4 and _strips_one_space(steps[3]):
            return DecoderRule(kind=DecoderKind.SENTENCEPIECE, strips_first_space=True)
    return DecoderRule(kind=DecoderKind.OTHER)


def _spells_space(step: dict[str, Any]) -> bool:
    return step["pattern"] == {"String": "▁"} and step["content"] == " "


def _strips_one_space(step: dict[str, Any]) -> bool:
    return step["type"] == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE (Radford et al. 2019).

    Printable Latin-1 bytes are spelt as themselves; the others, in order, from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes a byte-level token spells; a token with other characters is itself (UTF-8)."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def fallback_byte(token: str) -> int | None:
    """The byte of a SentencePiece byte token such as "<0xE2>", None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None
