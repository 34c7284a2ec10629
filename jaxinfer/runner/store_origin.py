"""What the programs of a store were made from, kept beside them in words.

A program of other versions, settings or sources has another name and is not found; that alone would
look as if nothing had been built. So each origin leaves a small file, and a start that finds only
others' says in what they differ. Knows files and lines of text; nothing of programs.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SUFFIX = ".origin"
_MOST_SHOWN = 60  # characters of a value: settings and models have thousands


class Difference(NamedTuple):
    """Of a value that two origins give."""

    theirs: str
    ours: str


def note_origin(directory: Path, origin: str, lines: Sequence[str]) -> None:
    """Leaves the file, or marks it as used; a directory that cannot be written stays as it is."""
    path = _path(directory, origin)
    with suppress(OSError):
        if path.exists():
            os.utime(path)
        else:
            path.write_text("\n".join(lines), encoding="utf-8")


def nearest_foreign(
    directory: Path, origin: str, lines: Sequence[str]
) -> Mapping[str, Difference] | None:
    """What differs in the most similar other origin; None when ours is there, or no other is."""
    if _path(directory, origin).exists():
        return None
    found = []
    for path in directory.glob(f"*{SUFFIX}"):
        with suppress(OSError, UnicodeDecodeError):
            found.append(_differences(path.read_text(encoding="utf-8").split("\n"), lines))
    return min(found, key=len) if found else None


def describe_difference(differences: Mapping[str, Difference]) -> str:
    """ "jaxlib: 0.10.1 (here 0.10.2), settings": long values are only named."""
    return ", ".join(
        f"{name}: {theirs} (here {ours})" if max(len(theirs), len(ours)) <= _MOST_SHOWN else name
        for name, (theirs, ours) in differences.items()
    )


def _differences(theirs: Sequence[str], ours: Sequence[str]) -> dict[str, Difference]:
    there, here = _by_name(theirs), _by_name(ours)
    return {
        name: Difference(there.get(name, "none"), here.get(name, "none"))
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    }


def _by_name(lines: Sequence[str]) -> dict[str, str]:
    parts = (line.partition(" ") for line in lines)
    return {name: value for name, _, value in parts}


def _path(directory: Path, origin: str) -> Path:
    return directory / f"{origin[:40]}{SUFFIX}"
