"""A file of records that survives a kill at any moment.

Each record is one line, appended by one write. What has been written to a file belongs to the
kernel, so a killed process loses nothing but the line it was writing: that one has no end, and is
cut off when the file is opened again. Only a machine that goes down can take more, the writes
since the last sync, which the run repeats. Knows lines with a number; not what else they hold.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from jaxinfer.batch.claim import sync_directory
from jaxinfer.batch.done import DoneIndex
from jaxinfer.batch.records import line_number
from jaxinfer.errors import ConfigError, JaxInferError
from jaxinfer.logging import get_logger

logger = get_logger(__name__)


class Journal:
    """Open for appending; `num_records` are in it."""

    def __init__(self, path: Path, done: DoneIndex) -> None:
        """Adds what the file holds to `done`. Raises ConfigError for a damaged one."""
        self.path = path
        self.num_records = 0
        end = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            for number, end in _whole_records(path):  # noqa: B007 - used below
                done.add(number)
                self.num_records += 1
            size = os.fstat(self._fd).st_size
            if end < size:
                logger.info("%s: cut off an unfinished line of %d bytes", path, size - end)
                os.ftruncate(self._fd, end)
            self._end = end
        except OSError as error:
            raise ConfigError(f"outputs: {path} cannot be used ({error}).") from error

    def append(self, line: bytes) -> None:
        """Raises JaxInferError when the file does not take it; the file can be continued then."""
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)  # or the next line would go on in this one
            raise JaxInferError(
                f"{self.path} cannot be written ({error.strerror}). Nothing is lost: repair that "
                "and start the same command again."
            ) from error
        self._end += len(line)
        self.num_records += 1

    def sync_later(self) -> Callable[[], None]:
        """What makes all that is written now survive a power cut; may be called in a thread.

        It has a descriptor of its own: the journal may be closed before. Raises JaxInferError.
        """
        fd = os.dup(self._fd)

        def sync() -> None:
            try:
                os.fsync(fd)
                sync_directory(self.path.parent)  # which holds its name
            except OSError as error:
                raise JaxInferError(
                    f"{self.path} cannot be brought to the disk ({error}): its last lines may be "
                    "lost. Repair the disk, or copy the file to another, and start the same "
                    "command again."
                ) from error
            finally:
                os.close(fd)

        return sync

    def close(self) -> None:
        """Returns when the disk has all."""
        self.sync_later()()
        self.drop()

    def drop(self) -> None:
        """Closes a file that will not be needed after a power cut."""
        os.close(self._fd)


def _whole_records(path: Path) -> Iterator[tuple[int, int]]:
    """(number, where it ends) of each record up to the unfinished end of the file, if it has one.

    A power cut may leave rubbish at the end, with line ends in it. Rubbish that good records
    follow is something else, and not ours to throw away.
    """
    end, bad_line = 0, 0
    with path.open("rb") as stream:
        for index, raw in enumerate(stream, 1):
            number = _number_of(raw)
            if number is None:
                bad_line = bad_line or index
            elif bad_line:
                raise ConfigError(
                    f"outputs: line {bad_line} of {path} is damaged. Remove that line and start "
                    "again: its answer will be made once more."
                )
            else:
                end += len(raw)
                yield number, end


def _number_of(raw: bytes) -> int | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        number = line_number(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return number if number > 0 else None
