"""Finds stop strings in a stream of text. Knows text only: no tokens, no requests."""

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    text_to_emit: str  # can be shown: no stop string can begin in it any more
    matched: str | None  # the stop string that ended the text


class StopStrings:
    """Watches one text. What it says does not depend on how the text is cut into pieces.

    The text ends where the first stop string is complete; of several that are complete at the
    same character, the longest counts. Nothing is emitted after that, and nothing of the stop
    string itself unless `include_in_output`.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool) -> None:
        self._stop = [text for text in stop if text]
        self._include = include_in_output
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""  # seen, may be the beginning of a stop string
        self._num_emitted = 0  # characters of _held that were emitted (when included)
        self._matched: str | None = None

    def feed(self, text: str) -> StopResult:
        """Takes the next piece of the text."""
        if not self._stop:
            return StopResult(text, None)
        if self._matched is not None:
            return StopResult("", self._matched)
        seen = self._held + text
        match = self._find(seen)
        if match is not None:
            start, end = match
            self._matched = seen[start:end]
            emit = seen[self._num_emitted : end if self._include else start]
            self._held, self._num_emitted = "", 0
            return StopResult(emit, self._matched)
        hold_from = self._hold_from(seen)
        emit_to = len(seen) if self._include else hold_from
        emit = seen[self._num_emitted : emit_to]
        self._held = seen[hold_from:]
        self._num_emitted = emit_to - hold_from
        return StopResult(emit, None)

    def feed_unchecked(self, text: str) -> str:
        """Takes a piece in which nothing stops (min_tokens is not reached); returns what to emit.

        A stop string must lie wholly behind such text, so what was held back is emitted too.
        """
        return self.flush() + text

    def flush(self) -> str:
        """The text is over without a stop string: gives what was held back."""
        rest = self._held[self._num_emitted :]
        self._held, self._num_emitted = "", 0
        return rest

    def _find(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the stop string that is complete first."""
        ends = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]
        if not ends:
            return None
        end, start = min(ends)
        return start, end

    def _hold_from(self, text: str) -> int:
        """Where the longest end of `text` that begins a stop string starts."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                return start
        return len(text)
