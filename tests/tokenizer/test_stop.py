"""Stop strings: what is emitted never depends on how the stream is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.tokenizer.stop import StopStrings


def run(pieces: list[str], stop: list[str], *, include: bool) -> tuple[str, str | None]:
    watcher = StopStrings(stop, include_in_output=include)
    out = ""
    for piece in pieces:
        result = watcher.feed(piece)
        out += result.text_to_emit
        if result.matched is not None:
            assert watcher.feed("more") == ("", result.matched)
            assert watcher.flush() == ""
            return out, result.matched
    return out + watcher.flush(), None


def reference(text: str, stop: list[str], *, include: bool) -> tuple[str, str | None]:
    """Character by character: the first end of any stop string, the longest one there."""
    for end in range(1, len(text) + 1):
        found = [word for word in stop if text[:end].endswith(word)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def splits(text: str) -> list[list[str]]:
    cuts = range(1, len(text))
    return [
        [text[a:b] for a, b in itertools.pairwise((0, *chosen, len(text)))]
        for count in range(len(text))
        for chosen in itertools.combinations(cuts, count)
    ]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("one STOP tw", ["STOP"]),
        ("aaabaaab", ["aab"]),
        ("xabcd", ["bcd", "abc"]),
        ("xabcd", ["abcd", "cd"]),
        ("no match", ["</s>", "\n\n"]),
        ("ab\n\n", ["\n\n"]),
        ("ababa", ["abab!", "baba"]),
    ],
)
def test_every_split_gives_the_same(text: str, stop: list[str], include: bool) -> None:
    expected = reference(text, stop, include=include)
    for pieces in splits(text):
        assert run(pieces, stop, include=include) == expected


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_any_stream(pieces: list[str], stop: list[str], include: bool) -> None:
    assert run(pieces, stop, include=include) == reference("".join(pieces), stop, include=include)


def test_holds_back_no_more_than_needed() -> None:
    watcher = StopStrings(["STOP"], include_in_output=False)
    assert watcher.feed("abc S") == ("abc ", None)
    assert watcher.feed("T") == ("", None)
    assert watcher.feed("x") == ("STx", None)


def test_included_stop_holds_nothing_back() -> None:
    watcher = StopStrings(["STOP"], include_in_output=True)
    assert watcher.feed("abc ST") == ("abc ST", None)
    assert watcher.feed("OP tail") == ("OP", "STOP")


def test_unchecked_text_cannot_stop() -> None:
    watcher = StopStrings(["ab"], include_in_output=False)
    assert watcher.feed_unchecked("xaba") == "xaba"
    assert watcher.feed("b") == ("b", None)  # the "a" before was not checked
    assert watcher.feed("a") == ("", None)
    assert watcher.feed_unchecked("b") == "ab"
