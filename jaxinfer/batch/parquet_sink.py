"""A directory of Parquet files, written so that a kill costs nothing.

Records first go to a segment, a journal of JSON lines. A full segment becomes one part file:
written under another name, put on the disk, renamed; then the segment goes away. So a record is
in a segment or in a part at any moment, and a segment beside its own part is left over from a
kill between the two. Names with `_` in front are skipped by those who read such directories.

    part-00000.parquet  part-00001.parquet  _segment-00002.jsonl  _job.json

Rows are in order of line within a part, parts in the order in which lines were finished.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from jaxinfer.batch.claim import Claim, Identity, sync_directory
from jaxinfer.batch.done import DoneIndex
from jaxinfer.batch.extras import pyarrow, pyarrow_parquet
from jaxinfer.batch.journal import Journal
from jaxinfer.batch.records import encode, row_of
from jaxinfer.errors import ConfigError, JaxInferError

PART = re.compile(r"part-(\d{5,})\.parquet")
PARTS = "part-*.parquet"  # a glob for the same
_SEGMENT = re.compile(r"_segment-(\d{5,})\.jsonl")
_UNFINISHED = ".tmp"
_INTEGERS = ("line", "prompt_tokens", "completion_tokens", "status_code")
_decoder = msgspec.json.Decoder()


class ParquetSink:
    """See the module."""

    def __init__(
        self, path: Path, identity: Identity, *, rows_per_file: int, overwrite: bool
    ) -> None:
        """Raises ConfigError for an output that is not this job's."""
        pyarrow_parquet(str(path))  # a missing library is known before any work
        if path.is_file():
            raise ConfigError(
                f"outputs: {path} is a file; Parquet output is a directory of files. Give another "
                "path."
            )
        self.done = DoneIndex()
        self._directory = path
        self._rows_per_file = rows_per_file
        self._claim = Claim(path / "_job.json", output=str(path))
        try:
            if overwrite:
                _clear(path)
                _refuse_foreign(path)
            self._claim.hold(identity, has_output=_has_records(path))
            self._index = self._recover()
            segment = self._segment(self._index)
            self._journal = Journal(segment, self.done) if segment.exists() else None
        except OSError as error:
            self._claim.release()
            raise ConfigError(f"outputs: {path} cannot be written ({error}).") from error
        except BaseException:
            self._claim.release()
            raise

    def write(self, record: dict[str, Any]) -> None:
        if self._journal is None:
            self._journal = Journal(self._segment(self._index), self.done)
        self._journal.append(encode(record))
        self.done.add(record["line"])
        if self._journal.num_records >= self._rows_per_file:
            self.finish()

    def sync_later(self) -> Callable[[], None]:
        return _nothing if self._journal is None else self._journal.sync_later()

    def finish(self) -> None:
        """The open segment becomes a part."""
        if self._journal is not None:
            journal, self._journal = self._journal, None
            self._to_part(self._index, journal)
            self._index += 1

    def close(self) -> None:
        try:
            if self._journal is not None:
                self._journal.close()
        finally:
            self._claim.release()

    def _recover(self) -> int:
        """The index of the segment to go on with; all others are parts then."""
        for path in self._directory.glob(f"part-*{_UNFINISHED}"):
            path.unlink()
        parts = _numbered(self._directory, PART)
        segments = _numbered(self._directory, _SEGMENT)
        for path in parts.values():
            self.done.update(_lines_of(path))
        for index in segments.keys() & parts.keys():
            segments.pop(index).unlink()
        newest = max((*parts, *segments), default=-1)
        open_index = newest if newest in segments else newest + 1
        for index, path in segments.items():
            if index != open_index:
                self._to_part(index, Journal(path, self.done))
        return open_index

    def _to_part(self, index: int, journal: Journal) -> None:
        journal.drop()  # it goes away when the disk has the part
        target = self._directory / f"part-{index:05d}.parquet"
        unfinished = target.with_name(target.name + _UNFINISHED)
        try:
            with journal.path.open("rb") as stream:
                rows = [row_of(_decoder.decode(raw)) for raw in stream]
            if rows:
                rows.sort(key=lambda row: row["line"])
                _write_table(unfinished, rows)
                os.replace(unfinished, target)
                sync_directory(self._directory)
            journal.path.unlink()
        except OSError as error:
            raise JaxInferError(
                f"{target} cannot be written ({error}). Nothing is lost: repair that and start "
                "the same command again."
            ) from error

    def _segment(self, index: int) -> Path:
        return self._directory / f"_segment-{index:05d}.jsonl"


def _nothing() -> None:
    pass


def _numbered(directory: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    matches = ((pattern.fullmatch(path.name), path) for path in directory.iterdir())
    return {int(match[1]): path for match, path in matches if match is not None}


def _has_records(directory: Path) -> bool:
    """A directory with other files in it is somebody else's, too."""
    return any(path.name != "_job.json" for path in directory.iterdir())


def _refuse_foreign(directory: Path) -> None:
    """What is left after `_clear` would be read as if it were an answer."""
    if _has_records(directory):
        raise ConfigError(f"outputs: {directory} holds files that no job wrote. Give another path.")


def _clear(directory: Path) -> None:
    """Removes what this module wrote, and nothing else."""
    for pattern in (PART, _SEGMENT):
        for path in _numbered(directory, pattern).values():
            path.unlink()
    for path in directory.glob(f"part-*{_UNFINISHED}"):
        path.unlink()


def _lines_of(path: Path) -> list[int]:
    try:
        table = pyarrow_parquet(str(path)).read_table(path, columns=["line"])
    except (OSError, pyarrow().ArrowException) as error:
        raise ConfigError(
            f"outputs: {path} is damaged: {error}. Remove it and start again: its answers will be "
            "made once more."
        ) from error
    return table.column("line").to_pylist()


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Returns when the disk has it."""
    arrow = pyarrow()
    types = [arrow.int64() if name in _INTEGERS else arrow.string() for name in rows[0]]
    schema = arrow.schema(list(zip(rows[0], types, strict=True)))
    table = arrow.Table.from_pylist(rows, schema=schema)
    pyarrow_parquet(str(path)).write_table(table, path, compression="zstd")
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
