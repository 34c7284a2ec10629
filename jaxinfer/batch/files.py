"""Input files: which there are, how they are opened, and what tells that they have not changed.

A path is a local one, a glob, or a URL that fsspec understands (s3://, gs://, https:// ...).
Knows bytes; nothing of lines' meaning.
"""

import glob
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from jaxinfer.batch.extras import fsspec_core
from jaxinfer.errors import ConfigError, JaxInferError

READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file raises that is damaged, cut short or gone."""
GLOB_MARKS = frozenset("*?[")

_CHUNK_BYTES = 2**20
_FILLED_LINE = re.compile(rb"\S[^\n]*")  # from its first character that is not blank


def is_url(path: str) -> bool:
    return "://" in path


def shown_path(path: str) -> str:
    """`path` as text that can be written: a name need not be UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()


@contextmanager
def storage_errors() -> Iterator[None]:
    """Makes an OSError of what a storage raises: each has its own exceptions."""
    try:
        yield
    except (*READ_ERRORS, JaxInferError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _StorageFile(io.RawIOBase):
    """A file of fsspec, to be read."""

    def __init__(self, path: str) -> None:
        super().__init__()
        with storage_errors():
            self._file = fsspec_core(path).open(path, "rb", compression="infer").open()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any, /) -> int:
        with storage_errors():
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        with storage_errors():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file."""

    path: str

    def open(self) -> IO[bytes]:
        """Its bytes, unpacked where its name ends in .gz. Raises what is in READ_ERRORS."""
        if is_url(self.path):
            return io.BufferedReader(_StorageFile(self.path), _CHUNK_BYTES)
        if self.path.endswith(".gz"):
            return cast(IO[bytes], gzip.open(self.path, "rb"))
        return open(self.path, "rb")  # noqa: SIM115 - the caller closes it


class Fingerprint:
    """What tells one state of a file from another.

    `digest` is of all bytes of a local file; of a URL it is what the storage says (its ETag or
    time of change), for reading it all would be a second download. `num_lines` counts those that
    are not blank, and is None where they were not read.
    """

    def __init__(self, *, num_bytes: int, digest: str, num_lines: int | None) -> None:
        self.num_bytes = num_bytes
        self.digest = digest
        self.num_lines = num_lines

    def as_json(self) -> dict[str, Any]:
        return {"bytes": self.num_bytes, "digest": self.digest}


def find_files(paths: Iterable[str]) -> list[InputFile]:
    """The files, each once, those of a glob in order of name.

    Raises ConfigError for none, for a directory, and for what cannot be looked up.
    """
    found: dict[str, str] = {}
    for path in paths:
        try:
            matches = _match_url(path) if is_url(path) else _match_local(path)
        except OSError as error:
            raise ConfigError(f"inputs: {path!r} cannot be looked up: {error}.") from error
        if not matches:
            raise ConfigError(f"inputs: there is no file {path!r}.")
        for match in matches:
            found.setdefault(match if is_url(match) else os.path.realpath(match), match)
    return [InputFile(path=path) for path in found.values()]


def _match_local(path: str) -> list[str]:
    plain = os.path.expanduser(path)
    if Path(plain).is_file():
        return [plain]
    if Path(plain).is_dir():
        raise ConfigError(f"inputs: {path!r} is a directory. Name its files: {path}/*.jsonl")
    if not GLOB_MARKS & set(path):
        return []
    return sorted(match for match in glob.glob(plain, recursive=True) if Path(match).is_file())


def _match_url(path: str) -> list[str]:
    core = fsspec_core(path)
    with storage_errors():
        filesystem, inner = core.url_to_fs(path)
        if not GLOB_MARKS & set(path):
            return [path] if filesystem.exists(inner) else []
        return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(inner))


def fingerprint(file: InputFile) -> Fingerprint:
    """Reads a local file once. Raises ConfigError when it cannot be read."""
    try:
        return _of_url(file) if is_url(file.path) else _of_local(file)
    except OSError as error:
        raise ConfigError(f"inputs: {file.path} cannot be read ({error}).") from error


def _of_local(file: InputFile) -> Fingerprint:
    digest, lines, num_bytes = hashlib.blake2b(digest_size=16), _LineCount(), 0
    with open(file.path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
            lines.add(chunk)
    is_text = not file.path.endswith((".gz", ".parquet"))
    return Fingerprint(
        num_bytes=num_bytes,
        digest=digest.hexdigest(),
        num_lines=lines.num_filled if is_text else None,
    )


class _LineCount:
    """Counts the lines that are not blank in a text that comes in pieces."""

    def __init__(self) -> None:
        self.num_filled = 0
        self._is_last_filled = False  # the line in which the last piece ended

    def add(self, piece: bytes) -> None:
        head, _, rest = piece.partition(b"\n")
        is_filled = bool(head.strip())
        self.num_filled += is_filled and not self._is_last_filled
        self.num_filled += sum(1 for _ in _FILLED_LINE.finditer(rest))
        if len(head) < len(piece):
            is_filled = bool(rest[rest.rfind(b"\n") + 1 :].strip())
            self._is_last_filled = is_filled
        else:
            self._is_last_filled |= is_filled


def _of_url(file: InputFile) -> Fingerprint:
    with storage_errors():
        filesystem, inner = fsspec_core(file.path).url_to_fs(file.path)
        info = filesystem.info(inner)
        state = filesystem.ukey(inner)
    told = {key: str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified") if key in info}
    what = repr((sorted(told.items()), state))
    return Fingerprint(
        num_bytes=info.get("size") or 0,
        digest=hashlib.blake2b(what.encode(), digest_size=16).hexdigest(),
        num_lines=None,
    )
