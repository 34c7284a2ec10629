"""Input files: which there are, how they are opened, and what tells that they have not changed.

A path is a local one, a glob, or a URL that fsspec understands (s3://, gs://, https:// ...).
Knows bytes; nothing of lines' meaning.
"""

import glob
import gzip
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from jaxinfer.batch.extras import fsspec_core
from jaxinfer.errors import ConfigError

_CHUNK_BYTES = 2**20
_GLOB_MARKS = frozenset("*?[")


def is_url(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file."""

    path: str

    def open(self) -> IO[bytes]:
        """Its bytes, unpacked where its name ends in .gz. Raises OSError."""
        if is_url(self.path):
            handle = fsspec_core(self.path).open(self.path, "rb", compression="infer").open()
            return cast(IO[bytes], handle)
        if self.path.endswith(".gz"):
            return cast(IO[bytes], gzip.open(self.path, "rb"))
        return open(self.path, "rb")  # noqa: SIM115 - the caller closes it


class Fingerprint:
    """What tells one state of a file from another.

    `digest` is of all bytes of a local file; of a URL it is what the storage says (its ETag or
    time of change), for reading it all would be a second download. `num_lines` counts line ends,
    and is None where they were not read.
    """

    def __init__(self, *, num_bytes: int, digest: str, num_lines: int | None) -> None:
        self.num_bytes = num_bytes
        self.digest = digest
        self.num_lines = num_lines

    def as_json(self) -> dict[str, Any]:
        return {"bytes": self.num_bytes, "digest": self.digest}


def find_files(paths: Iterable[str]) -> list[InputFile]:
    """The files, those of a glob in order of name. Raises ConfigError for none or a directory."""
    found: dict[str, None] = {}
    for path in paths:
        matches = _match_url(path) if is_url(path) else _match_local(path)
        if not matches:
            raise ConfigError(f"inputs: there is no file {path!r}.")
        found |= dict.fromkeys(matches)
    return [InputFile(path=path) for path in found]


def _match_local(path: str) -> list[str]:
    plain = str(Path(path).expanduser())
    if Path(plain).is_file():
        return [plain]
    if Path(plain).is_dir():
        raise ConfigError(f"inputs: {path!r} is a directory. Name its files: {path}/*.jsonl")
    if not _GLOB_MARKS & set(path):
        return []
    return sorted(match for match in glob.glob(plain, recursive=True) if Path(match).is_file())


def _match_url(path: str) -> list[str]:
    core = fsspec_core(path)
    try:
        filesystem, inner = core.url_to_fs(path)
        if not _GLOB_MARKS & set(path):
            return [path] if filesystem.exists(inner) else []
        return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(inner))
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"inputs: {path!r} cannot be looked up: {error}.") from error


def fingerprint(file: InputFile) -> Fingerprint:
    """Reads a local file once. Raises ConfigError when it cannot be read."""
    try:
        return _of_url(file) if is_url(file.path) else _of_local(file)
    except OSError as error:
        raise ConfigError(f"inputs: {file.path} cannot be read ({error}).") from error


def _of_local(file: InputFile) -> Fingerprint:
    digest, num_lines, num_bytes, last = hashlib.blake2b(digest_size=16), 0, 0, b"\n"
    with open(file.path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
            num_lines += chunk.count(b"\n")
            last = chunk[-1:]
    is_text = not file.path.endswith((".gz", ".parquet"))
    return Fingerprint(
        num_bytes=num_bytes,
        digest=digest.hexdigest(),
        num_lines=num_lines + (last != b"\n") if is_text else None,
    )


def _of_url(file: InputFile) -> Fingerprint:
    filesystem, inner = fsspec_core(file.path).url_to_fs(file.path)
    info = filesystem.info(inner)
    told = {key: str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified") if key in info}
    what = repr((sorted(told.items()), filesystem.ukey(inner)))
    return Fingerprint(
        num_bytes=info.get("size") or 0,
        digest=hashlib.blake2b(what.encode(), digest_size=16).hexdigest(),
        num_lines=None,
    )
