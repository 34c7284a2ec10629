"""The output of one sequence: tokens in, text out, up to a stop string.

Knows detokenizer and stop strings; must not know messages' senders, queues or requests.
"""

from jaxinfer.core.messages import SequenceUpdate
from jaxinfer.core.outputs import CompletionOutput, Logprob
from jaxinfer.core.request import FinishReason
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import TokenLogprobs
from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer
from jaxinfer.tokenizer.stop import StopStrings
from jaxinfer.tokenizer.tokenizer import Tokenizer


def logprob_entry(
    entry: TokenLogprobs, num_top: int, tokenizer: Tokenizer | None
) -> dict[int, Logprob]:
    """The token that is there first, then the `num_top` most likely ones, most likely first."""
    values: dict[int, Logprob] = {}
    for position, token_id in enumerate(entry.token_ids[: num_top + 1]):
        if token_id not in values:
            values[token_id] = Logprob(
                logprob=entry.logprobs[position],
                rank=position or entry.rank,
                decoded_token=None if tokenizer is None else tokenizer.token_text(token_id),
            )
    return values


class SequenceOutput:
    """Collects one sequence. `snapshot` or `take_delta` hands out what there is."""

    def __init__(
        self, index: int, prompt_token_ids: list[int], params: SamplingParams, tokenizer: Tokenizer
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self._error: str | None = None
        self._params = params
        self._tokenizer = tokenizer if params.detokenize else None
        self._detokenizer: IncrementalDetokenizer | None = None
        if params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        self._stop: StopStrings | None = None
        if params.stop:
            self._stop = StopStrings(
                params.stop, include_in_output=params.include_stop_str_in_output
            )
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0
        self.has_news = False
        # Text that goes straight from the detokenizer to the user.
        self._is_plain = self._stop is None and params.logprobs is None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, update: SequenceUpdate) -> bool:
        """Takes the core's news; True when a stop string ended the sequence before the core did."""
        if self._is_plain and update.finish_reason is None:  # as nearly always
            self._add_plain(update.new_token_ids)
            return False
        num_before = self.num_tokens
        matched = self._add_tokens(update)
        self._add_logprobs(update, self.num_tokens - num_before)
        if matched is not None:
            self._finish(FinishReason.STOP.value, matched)
            return update.finish_reason is None
        if update.finish_reason is not None:
            self._flush()
            self._error = update.error
            # A stop string that was held back for the end may still be found in it.
            if self.finish_reason is None:
                self._finish(str(update.finish_reason), update.stop_reason)
        return False

    def abort(self) -> None:
        """Ends it on the user's wish."""
        self._flush()
        self._finish(FinishReason.ABORT.value, None)

    def snapshot(self) -> CompletionOutput:
        """All that was collected so far."""
        self.has_news = False
        self._text = ["".join(self._text)]
        return self._make_output(self._token_ids.copy(), self._logprobs.copy())

    def take_delta(self) -> CompletionOutput:
        """What was collected since the last call; it is forgotten here."""
        self.has_news = False
        output = self._make_output(self._token_ids, self._logprobs)
        self._text, self._token_ids, self._logprobs = [], [], []
        return output

    def _make_output(
        self, token_ids: list[int], logprobs: list[dict[int, Logprob]]
    ) -> CompletionOutput:
        has_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._text),
            token_ids=token_ids,
            logprobs=logprobs if has_logprobs else None,
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            error=self._error,
        )

    def _add_plain(self, token_ids: list[int]) -> None:
        """What `_add_tokens` does where nothing can end the text."""
        if not token_ids:
            return
        self.has_news = True
        self._token_ids += token_ids
        self.num_tokens += len(token_ids)
        if self._detokenizer is not None:
            for token_id in token_ids:
                text = self._detokenizer.push(token_id)
                if text:
                    self._text.append(text)

    def _add_tokens(self, update: SequenceUpdate) -> str | None:
        """Tokens up to the one that completes a stop string, which is returned."""
        # The token that ends a sequence is part of its tokens, not of its text.
        ends_by_token = update.finish_reason == FinishReason.STOP
        is_hidden = ends_by_token and not self._params.include_stop_str_in_output
        num_visible = len(update.new_token_ids) - is_hidden
        for position, token_id in enumerate(update.new_token_ids):
            self.has_news = True
            self._token_ids.append(token_id)
            self.num_tokens += 1
            if self._detokenizer is None or position >= num_visible:
                continue
            matched = self._emit(self._detokenizer.push(token_id))
            if matched is not None:
                return matched
        return None

    def _emit(self, text: str) -> str | None:
        if not text:
            return None
        if self._stop is None:
            self._text.append(text)
            return None
        if self.num_tokens <= self._params.min_tokens:
            self._text.append(self._stop.feed_unchecked(text))
            return None
        result = self._stop.feed(text)
        self._text.append(result.text_to_emit)
        return result.matched

    def _flush(self) -> None:
        """The text that was held back: half characters, what might have become a stop string."""
        if self._detokenizer is None:
            return
        matched = self._emit(self._detokenizer.finish())
        if matched is not None:
            self._finish(FinishReason.STOP.value, matched)
        elif self._stop is not None:
            self._text.append(self._stop.flush())

    def _finish(self, reason: str, stop_reason: int | str | None) -> None:
        self.finish_reason = reason
        self._stop_reason = stop_reason
        self.has_news = True

    def _add_logprobs(self, update: SequenceUpdate, num_tokens: int) -> None:
        num_top = self._params.logprobs
        if num_top is None or update.logprobs is None:
            return
        for entry in update.logprobs[:num_tokens]:
            self._cumulative_logprob += entry.logprobs[0]
            self._logprobs.append(logprob_entry(entry, num_top, self._tokenizer))
