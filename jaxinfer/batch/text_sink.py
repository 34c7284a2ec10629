r"""Plain text: line N of the output answers line N of the inputs.

Text has no room for numbers, errors or counts, and must be in order, so it is made at the end, in
one go, from records that are kept beside it: `answers.txt.jsonl`, a `JsonlSink`. They are what
survives a kill, and they stay. In an answer, a backslash becomes \\, a line end \n and a carriage
return \r; where there is no answer (a blank line, an error) the line is empty.
"""

import filecmp
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from jaxinfer.batch.claim import Identity, sync_directory
from jaxinfer.batch.records import row_of
from jaxinfer.batch.sinks import JsonlSink
from jaxinfer.errors import ConfigError, JaxInferError

_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})
_decoder = msgspec.json.Decoder()


class TextSink:
    """See the module."""

    def __init__(self, path: Path, identity: Identity, *, overwrite: bool) -> None:
        """Raises ConfigError for an output that is not this job's."""
        self._path = path
        self._records_path = path.with_name(path.name + ".jsonl")
        if path.is_dir():
            raise ConfigError(f"outputs: {path} is a directory. Give the path of a file.")
        if path.exists() and not overwrite and not self._has_records():
            raise ConfigError(
                f"outputs: {path} exists already and was not begun by a job that can be "
                "continued. Give another output, or --overwrite to start anew."
            )
        self._records = JsonlSink(self._records_path, identity, overwrite=overwrite)
        if overwrite:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._records.close()
                raise ConfigError(f"outputs: {path} cannot be replaced ({error}).") from error
        self.done = self._records.done

    def _has_records(self) -> bool:
        return self._records_path.exists() and self._records_path.stat().st_size > 0

    def write(self, record: dict[str, Any]) -> None:
        self._records.write(record)

    def sync_later(self) -> Callable[[], None]:
        return self._records.sync_later()

    def finish(self) -> None:
        """Writes the text; a text that is there already must be the same."""
        unfinished = self._path.with_name(self._path.name + ".tmp")
        try:
            with self._records_path.open("rb") as records, unfinished.open("wb") as text:
                text.writelines(_lines(records))
                text.flush()
                os.fsync(text.fileno())
            if self._path.exists() and not filecmp.cmp(self._path, unfinished, shallow=False):
                raise JaxInferError(
                    f"{self._path} was changed or written by others. Nothing is lost: the answers "
                    f"are in {unfinished}. Move one of them away."
                )
            os.replace(unfinished, self._path)
            sync_directory(self._path.parent)
        except OSError as error:
            raise JaxInferError(
                f"{self._path} cannot be written ({error}). Nothing is lost: repair that and start "
                "the same command again."
            ) from error

    def close(self) -> None:
        self._records.close()


def _lines(records: IO[bytes]) -> Iterator[bytes]:
    """The text's lines; of the records only their places are held, 8 bytes each."""
    places = array("q")
    start = 0
    for raw in records:
        number = _decoder.decode(raw)["line"]
        places.extend([-1] * (number - len(places)))
        places[number - 1] = start
        start += len(raw)
    for place in places:
        if place < 0:
            yield b"\n"
            continue
        records.seek(place)
        text = row_of(_decoder.decode(records.readline()))["text"] or ""
        yield text.translate(_ESCAPES).encode() + b"\n"
