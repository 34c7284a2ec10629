"""Where records go: a JSONL file, or a directory of Parquet files.

Both can be killed at any moment and opened again: `done` then holds exactly what is kept.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from jaxinfer.batch.claim import Claim, Identity
from jaxinfer.batch.done import DoneIndex
from jaxinfer.batch.journal import Journal
from jaxinfer.batch.records import encode
from jaxinfer.errors import ConfigError


class Sink(Protocol):
    """Holds the claim on an output until it is closed."""

    done: DoneIndex

    def write(self, record: dict[str, Any]) -> None:
        """Keeps a record, from now on and through a kill. Raises JaxInferError."""
        ...

    def sync_later(self) -> Callable[[], None]:
        """See `Journal.sync_later`."""
        ...

    def finish(self) -> None:
        """All lines are done: brings the output into its last form."""
        ...

    def close(self) -> None:
        """Ends the run, finished or not."""
        ...


class JsonlSink:
    """The output is its own journal: what is in it is done. Records come as they are made."""

    def __init__(self, path: Path, identity: Identity, *, overwrite: bool) -> None:
        """Raises ConfigError for an output that is not this job's."""
        if path.is_dir():
            raise ConfigError(f"outputs: {path} is a directory. Give the path of a file.")
        self.done = DoneIndex()
        self._claim = Claim(path.with_name(path.name + ".job"), output=str(path))
        try:
            if overwrite:
                path.unlink(missing_ok=True)
            self._claim.hold(identity, has_output=path.exists() and path.stat().st_size > 0)
            self._journal = Journal(path, self.done)
        except OSError as error:
            self._claim.release()
            raise ConfigError(f"outputs: {path} cannot be written ({error}).") from error
        except BaseException:
            self._claim.release()
            raise

    def write(self, record: dict[str, Any]) -> None:
        self._journal.append(encode(record))
        self.done.add(record["line"])

    def sync_later(self) -> Callable[[], None]:
        return self._journal.sync_later()

    def finish(self) -> None:
        """The file is in its last form at any time."""

    def close(self) -> None:
        try:
            self._journal.close()
        finally:
            self._claim.release()
