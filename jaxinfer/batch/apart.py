"""Refuses an output among the inputs: --overwrite would destroy it, and a run would read itself.

Two paths may name one file in many ways (.., links, file:// URLs), so files are compared, not
names. Knows paths; nothing of what files hold.
"""

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxinfer.batch.delivery import local_output
from jaxinfer.batch.files import GLOB_MARKS, InputFile, is_url
from jaxinfer.config.job import OutputsConfig, output_format
from jaxinfer.errors import ConfigError

_LOCAL_SCHEMES = ("file://", "local://")


class _Written(NamedTuple):
    """What a job writes: a file, or all of a directory."""

    path: str
    is_directory: bool


def check_apart(outputs: OutputsConfig, paths: Sequence[str], files: Sequence[InputFile]) -> None:
    """`files` are what `paths` name now. Raises ConfigError that names the input."""
    written = _written(outputs)
    for path in (file.path for file in files):
        if any(_is_written(path, target) for target in written):
            raise _problem(outputs, path)
    for path in paths:
        if any(_would_match(path, target) for target in written):
            raise _problem(outputs, path)


def _problem(outputs: OutputsConfig, path: str) -> ConfigError:
    return ConfigError(
        f"outputs.path={outputs.path!r} is one of the inputs ({path}), or they lie in it. Give "
        "another."
    )


def _written(outputs: OutputsConfig) -> list[_Written]:
    local = str(local_output(outputs))
    ends = dict.fromkeys((_local(local), _local(outputs.path)))  # one, unless it is a URL
    if output_format(outputs) == "parquet":
        return [_Written(path, is_directory=True) for path in ends]
    suffixes = ("", ".job", ".jsonl", ".jsonl.job")  # (claims; the records of plain text)
    return [_Written(path + suffix, is_directory=False) for path in ends for suffix in suffixes]


def _local(path: str) -> str:
    """As it is compared: the real path, or a URL that is not of this machine."""
    for scheme in _LOCAL_SCHEMES:
        path = path.removeprefix(scheme)
    return path.rstrip("/") if is_url(path) else os.path.realpath(os.path.expanduser(path))


def _is_written(path: str, target: _Written) -> bool:
    real = _local(path)
    if target.is_directory:
        return real == target.path or real.startswith(target.path + "/")
    if real == target.path:
        return True
    is_there = not is_url(target.path) and not is_url(real) and os.path.exists(target.path)
    return is_there and os.path.samefile(real, target.path)  # (a hard link)


def _would_match(path: str, target: _Written) -> bool:
    """A glob that will find the output once it is there."""
    if not GLOB_MARKS & set(path) or Path(path).is_file():
        return False
    parts = _local_glob(path).split("/")
    inside = ["part-00000.parquet"] if target.is_directory else []
    return _matches([*target.path.split("/"), *inside], parts)


def _local_glob(path: str) -> str:
    """Its directories up to the first mark as they really are."""
    for scheme in _LOCAL_SCHEMES:
        path = path.removeprefix(scheme)
    if is_url(path):
        return path
    parts = os.path.abspath(os.path.expanduser(path)).split("/")
    marked = (index for index, part in enumerate(parts) if GLOB_MARKS & set(part))
    first = next(marked, len(parts))  # (a/[b]/../c has none left)
    return "/".join([os.path.realpath("/".join(parts[:first]) or "/").rstrip("/"), *parts[first:]])


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )
