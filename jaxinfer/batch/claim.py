"""The claim on an output: one run at a time, and only for the job that began it.

A small file beside the output says which job it is (fingerprints of the inputs, and the settings
that answers depend on) and is locked while a run writes. It is written and on the disk before the
output exists, so an output without a claim is somebody else's file. Knows no records.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.errors import ConfigError

VERSION = 1
_MAX_SHOWN = 80

Identity = Mapping[str, Any]
"""What a job is: JSON values, compared by name."""


class Claim:
    """Holds the lock until `release`."""

    def __init__(self, path: Path, *, output: str) -> None:
        """Raises ConfigError when another run has it, or when `path` cannot be written."""
        self._output = output
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"outputs: {output} cannot be written ({error}).") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(
                f"outputs: another run is writing {output} now ({path} is locked). Wait for it, "
                "or give another output."
            ) from error
        self._path = path

    def hold(self, identity: Identity, *, has_output: bool) -> None:
        """Raises ConfigError unless the output is this job's, or nobody's yet and now this job's.

        `has_output`: there is something in it. What says whose it is must not be touched then,
        not even to write the same again: a kill in the middle would make it nobody's.
        """
        known = self._read()
        if not has_output:
            self._write(identity)
        elif known is None:
            raise ConfigError(
                f"outputs: {self._output} exists already and was not begun by a job that can be "
                "continued. Give another output, or --overwrite to start anew."
            )
        else:
            self._compare(known, plain_identity(identity))

    def _write(self, identity: Identity) -> None:
        """Returns when the disk has it."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(plain_identity(identity), indent=1).encode() + b"\n", 0)
        os.fsync(self._fd)
        sync_directory(self._path.parent)

    def release(self) -> None:
        os.close(self._fd)  # which also unlocks

    def _read(self) -> dict[str, Any] | None:
        """What was written; None for nothing, or for a write that a kill cut short."""
        raw = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        try:
            value = json.loads(raw)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def _compare(self, known: dict[str, Any], asked: dict[str, Any]) -> None:
        for name in [*known, *(name for name in asked if name not in known)]:
            was, now = known.get(name), asked.get(name)
            if was != now:
                raise ConfigError(
                    f"outputs: {self._output} was begun with other {name}: {_shown(was)} then, "
                    f"{_shown(now)} now. Restore it to continue, give another output, or "
                    "--overwrite to start anew."
                )


def sync_directory(path: Path) -> None:
    """Returns when the names in a directory are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def plain_identity(identity: Identity) -> dict[str, Any]:
    """As it will be read back: lists for tuples, text for keys."""
    return json.loads(json.dumps({"version": VERSION, **identity}))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
