"""Token ids to text while they come: for streaming. Knows the tokenizer, nothing of requests.

The text equals what decoding prompt and output together adds to decoding the prompt. Where the
decoder is byte-level BPE or SentencePiece (nearly every LLM) tokens are turned into bytes from a
cached table and decoded by an incremental UTF-8 decoder: constant time and exact. Other decoders
go through a window of the last tokens, decoded with and without the new one; this is the
prefix-offset method of Hugging Face text-generation-inference (`decode_token` in
server/text_generation_server/models/model.py).
"""

import codecs
import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

from jaxinfer.tokenizer.decoding import DecoderKind, fallback_byte
from jaxinfer.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_WINDOW_TOKENS = 6  # prompt tokens that the window method starts from
_MAX_HELD_TOKENS = 16  # tokens without a complete character after which the window gives up
_MAX_HELD_BYTES = 32  # of a run of SentencePiece byte tokens, see _SentencePieceStream
_MAX_UTF8_BYTES = 4
_CHARACTER_TOKENS = 2 * _MAX_UTF8_BYTES  # prompt tokens that surely hold its unfinished character

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class IncrementalDetokenizer:
    """The text of one sequence's output. Never gives text that a later token could change."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._is_skipped = tokenizer.is_special if skip_special_tokens else _nothing_is
        self._stream: _Stream
        match tokenizer.decoder_rule.kind:
            case DecoderKind.BYTE_LEVEL:
                tail = self._visible_tail(prompt_token_ids, _CHARACTER_TOKENS)
                self._stream = _ByteLevelStream(tokenizer, tail)
            case DecoderKind.SENTENCEPIECE:
                tail = self._visible_tail(prompt_token_ids, _MAX_HELD_BYTES)
                self._stream = _SentencePieceStream(tokenizer, tail)
            case _:
                tail = self._visible_tail(prompt_token_ids, _WINDOW_TOKENS)
                spaces = skip_special_tokens or spaces_between_special_tokens
                self._stream = _WindowStream(tokenizer, tail, spaces_between_special_tokens=spaces)
        self._push = self._stream.push

    def _visible_tail(self, prompt_token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The last tokens of the prompt that show in text, as many as the stream looks at."""
        tail: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if len(tail) == num_tokens:
                break
            if not self._is_skipped(token_id):
                tail.append(token_id)
        return tail[::-1]

    def push(self, token_id: int) -> str:
        """Takes the next output token; returns the text that has become certain."""
        return "" if self._is_skipped(token_id) else self._push(token_id)

    def append(self, token_ids: Iterable[int]) -> str:
        """`push` for several tokens."""
        return "".join([self.push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """The output is over: the text still held back (an unfinished character is U+FFFD)."""
        return self._stream.finish()


def _nothing_is(token_id: int) -> bool:  # noqa: ARG001
    return False


class _ByteLevelStream:
    """Byte-level BPE: the text is the UTF-8 decoding of all tokens' bytes in a row."""

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int]) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decode = _Utf8Decoder(errors="replace").decode
        tail = b"".join(self._token_bytes(id_) for id_ in prompt_tail)
        # A character that the prompt leaves unfinished may be finished by the output; if it is
        # not, its U+FFFD belongs to the prompt's text, so one is dropped.
        self._prompt_is_open = bool(_open_character(tail))
        self._decode(_open_character(tail))

    def push(self, token_id: int) -> str:
        text = self._decode(self._token_bytes(token_id))
        return self._from_prompt_on(text) if self._prompt_is_open else text

    def finish(self) -> str:
        return self._from_prompt_on(self._decode(b"", True))  # noqa: FBT003  (final)

    def _from_prompt_on(self, text: str) -> str:
        if self._prompt_is_open and text:
            self._prompt_is_open = False
            return text.removeprefix(_REPLACEMENT)
        return text


def _open_character(data: bytes) -> bytes:
    """The bytes at the end of `data` that begin a UTF-8 character without ending it."""
    decoder = _Utf8Decoder(errors="replace")
    decoder.decode(data[-2 * _MAX_UTF8_BYTES :])
    return decoder.getstate()[0]


class _SentencePieceStream:
    """SentencePiece BPE with byte fallback.

    The decoder reads a run of byte tokens as UTF-8 if all of it is valid, and as one U+FFFD for
    each byte if not. So a run is held back until it ends; from _MAX_HELD_BYTES on its complete
    characters are given all the same, for text in a script that is nothing but byte tokens. Only
    a longer run that turns invalid afterwards differs from the decoder.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._run = bytearray()  # byte tokens not given yet
        self._run_is_broken = False  # it is invalid: each byte is U+FFFD at once
        self._strips_space = tokenizer.decoder_rule.strips_first_space and not prompt_tail
        pieces = [tokenizer.token_piece(id_) or "" for id_ in prompt_tail]
        run = itertools.takewhile(
            lambda byte: byte is not None, (fallback_byte(piece) for piece in reversed(pieces))
        )
        prompt_bytes = bytes(byte for byte in run if byte is not None)[::-1]
        self._run += _open_character(prompt_bytes)
        self._num_prompt_bytes = len(self._run)  # of _run: a character that the prompt began

    def push(self, token_id: int) -> str:
        piece = self._tokenizer.token_piece(token_id)
        if piece is None:
            return ""
        byte = fallback_byte(piece)
        if byte is None:
            return self._strip(self._take_run() + piece.replace("▁", " "))
        self._run.append(byte)
        is_long = len(self._run) >= _MAX_HELD_BYTES
        return self._overflow() if is_long or self._run_is_broken else ""

    def finish(self) -> str:
        return self._strip(self._take_run())

    def _overflow(self) -> str:
        """What a run that is too long to hold gives, now that it has one more byte."""
        text, rest = "", b""
        decoder = _Utf8Decoder(errors="strict")
        try:
            text = decoder.decode(self._run)
            rest = decoder.getstate()[0]
        except UnicodeDecodeError:
            self._run_is_broken = True
        if self._run_is_broken:
            text, rest = _REPLACEMENT * (len(self._run) - self._num_prompt_bytes), b""
        self._run, self._num_prompt_bytes = bytearray(rest), 0
        return self._strip(text)

    def _take_run(self) -> str:
        run, self._run = self._run, bytearray()
        num_prompt_bytes, self._num_prompt_bytes = self._num_prompt_bytes, 0
        if self._run_is_broken:
            self._run_is_broken = False
            return ""  # all of it was given
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * (len(run) - num_prompt_bytes)

    def _strip(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


class _WindowStream:
    """Any decoder: what the last tokens' text gains by the new ones."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tail: Sequence[int],
        *,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._spaces = spaces_between_special_tokens
        self._prefix = list(prompt_tail[-_WINDOW_TOKENS:])  # given; what follows depends on it
        self._new: list[int] = []  # not given yet
        self._prefix_text = self._decode(self._prefix)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, spaces_between_special_tokens=self._spaces
        )

    def push(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._decode(self._prefix + self._new)
        is_uncertain = text.endswith(_REPLACEMENT) or len(text) <= len(self._prefix_text)
        if is_uncertain and len(self._new) < _MAX_HELD_TOKENS:
            return ""
        return self._give(text)

    def finish(self) -> str:
        return self._give(self._decode(self._prefix + self._new))

    def _give(self, text: str) -> str:
        gained = text[len(self._prefix_text) :]
        self._prefix, self._new = self._new, []
        self._prefix_text = self._decode(self._prefix)
        return gained
