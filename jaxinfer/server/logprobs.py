"""Log-probabilities in the three JSON forms of the API. Knows tokens and JSON, not requests.

An entry is a `dict[token id, Logprob]` whose first key is the token that is there; the k most
likely follow.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.core.outputs import Logprob
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
LOWEST_LOGPROB = -9999.0  # JSON has no -Infinity; the value is OpenAI's

Entry = Mapping[int, Logprob]


class LogprobFormatter:
    """Shows entries; `as_token_ids` names tokens "token_id:N", which never collide."""

    def __init__(self, tokenizer: Tokenizer, *, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids

    def token(self, token_id: int, logprob: Logprob | None = None) -> str:
        if self._as_token_ids:
            return f"token_id:{token_id}"
        text = logprob.decoded_token if logprob is not None else None
        return self._tokenizer.token_text(token_id) if text is None else text

    def chat(self, entries: Sequence[Entry], num_top: int) -> dict[str, Any]:
        """`logprobs` of a chat choice."""
        return {"content": [self._chat_entry(entry, num_top) for entry in entries]}

    def _chat_entry(self, entry: Entry, num_top: int) -> dict[str, Any]:
        token_id, logprob = next(iter(entry.items()))
        ranked = [item for item in entry.items() if item[1].rank is not None]
        ranked.sort(key=lambda item: item[1].rank or 0)
        top = [self._chat_token(*item) for item in ranked[:num_top]]
        return {**self._chat_token(token_id, logprob), "top_logprobs": top}

    def _chat_token(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": self.token(token_id, logprob),
            "logprob": max(logprob.logprob, LOWEST_LOGPROB),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def completion(
        self,
        token_ids: Sequence[int],
        entries: Sequence[Entry | None],
        text_offsets: Sequence[int],
    ) -> dict[str, Any]:
        """`logprobs` of a completion choice, or of a part of one."""
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            logprob = entry.get(token_id) if entry else None
            tokens.append(self.token(token_id, logprob))
            logprobs.append(max(logprob.logprob, LOWEST_LOGPROB) if logprob else None)
            tops.append(self._completion_top(entry) if entry else None)
        return {
            "text_offset": list(text_offsets),
            "token_logprobs": logprobs,
            "tokens": tokens,
            "top_logprobs": tops,
        }

    def _completion_top(self, entry: Entry) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in sorted(entry.items(), key=lambda item: -item[1].logprob):
            # Halves of characters share the text U+FFFD: the likeliest of them stands.
            top.setdefault(self.token(token_id, logprob), max(logprob.logprob, LOWEST_LOGPROB))
        return top

    def prompt(self, entries: Sequence[Entry | None]) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: null for the first position, then token id -> numbers."""
        return [None if entry is None else self._prompt_entry(entry) for entry in entries]

    def _prompt_entry(self, entry: Entry) -> dict[str, Any]:
        return {
            str(token_id): {
                "logprob": max(logprob.logprob, LOWEST_LOGPROB),
                "rank": logprob.rank,
                "decoded_token": self.token(token_id, logprob),
            }
            for token_id, logprob in entry.items()
        }


class TextOffsets:
    """Where each token of a choice begins in the choice's text, in characters.

    The length of a token's own text would not do: parts of a character are U+FFFD each, and the
    special tokens are not in the text at all.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        self._end = 0

    def of_prompt(self, text: str) -> list[int]:
        """Of the prompt's tokens, shown as `text`, behind which the output then begins."""
        detokenizer = IncrementalDetokenizer(self._tokenizer, (), skip_special_tokens=False)
        begins = self._advance(detokenizer, self._prompt_token_ids)
        # What the tokenizer itself put in front (<s>) is not in the text that the client sent.
        hidden = max(0, self._end + len(detokenizer.finish()) - len(text))
        self._end = len(text)
        return [min(max(0, begin - hidden), len(text)) for begin in begins]

    def of_output(self, token_ids: Sequence[int]) -> list[int]:
        """Of the next tokens of the output."""
        return self._advance(self._detokenizer, token_ids)

    def _advance(self, detokenizer: IncrementalDetokenizer, token_ids: Sequence[int]) -> list[int]:
        begins = []
        for token_id in token_ids:
            text = detokenizer.append((token_id,))
            own = self._tokenizer.token_text(token_id).rstrip(_REPLACEMENT)
            # A broken character that earlier tokens left comes with this token, and before it.
            num_earlier = len(text) - len(own) if own and text.endswith(own) else 0
            begins.append(self._end + num_earlier)
            self._end += len(text)
        return begins
