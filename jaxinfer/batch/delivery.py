"""Outputs at a URL: claimed before the work, brought there after it.

A URL cannot be appended to, so answers are kept on this machine until they are complete. A small
object beside the output (`answers.jsonl.job`, in a directory `_job.json`) says which job it is of,
as beside a local one; that it could be written also shows that the place can be. Knows files and
storages; nothing of records.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxinfer.batch.claim import Identity, plain_identity
from jaxinfer.batch.extras import fsspec_core
from jaxinfer.batch.files import is_url, storage_errors
from jaxinfer.batch.parquet_sink import PART, PARTS
from jaxinfer.config.env import cache_dir
from jaxinfer.config.job import OutputsConfig, output_format
from jaxinfer.errors import ConfigError, JaxInferError


def local_output(outputs: OutputsConfig) -> Path:
    """Where answers are kept while the job runs."""
    if not is_url(outputs.path):
        return Path(outputs.path).expanduser()
    digest = hashlib.sha256(outputs.path.encode()).hexdigest()[:16]
    directory = Path(outputs.work_dir) if outputs.work_dir else cache_dir() / "batch"
    return directory.expanduser() / digest / outputs.path.rstrip("/").rpartition("/")[2]


class Destination:
    """The place that `outputs.path`, a URL, names."""

    def __init__(self, outputs: OutputsConfig) -> None:
        """Raises ConfigError for a storage that is unknown, or whose package is missing."""
        self._url = outputs.path
        self._is_directory = output_format(outputs) == "parquet"
        try:
            with storage_errors():
                self._files, target = fsspec_core(self._url).url_to_fs(self._url)
        except OSError as error:
            raise ConfigError(f"outputs: {self._url} cannot be used ({error}).") from error
        self._target = target.rstrip("/")
        self._mark = self._target + ("/_job.json" if self._is_directory else ".job")

    def claim(self, identity: Identity, *, overwrite: bool) -> None:
        """Raises ConfigError for what others wrote, and for a place that cannot be written."""
        try:
            with storage_errors():
                self._files.invalidate_cache()
                self._check_owner(plain_identity(identity), overwrite=overwrite)
                self._make_parent(self._mark)
                content = json.dumps(plain_identity(identity), indent=1).encode() + b"\n"
                self._files.pipe_file(self._mark, content)
        except OSError as error:
            raise ConfigError(f"outputs: {self._url} cannot be written ({error}).") from error

    def bring(self, local: Path) -> None:
        """Copies a finished output. Raises JaxInferError, which says where the answers are."""
        try:
            with storage_errors():
                self._copy(local)
        except OSError as error:
            raise JaxInferError(
                f"The answers are complete in {local}, but could not be brought to {self._url} "
                f"({error}). Start the same command again to try once more, or copy them."
            ) from error

    def _copy(self, local: Path) -> None:
        self._files.invalidate_cache()
        if not self._is_directory:
            self._make_parent(self._target)
            self._files.put_file(str(local), self._target)
            return
        self._files.makedirs(self._target, exist_ok=True)
        parts = sorted(local.glob(PARTS))
        for part in parts:
            self._files.put_file(str(part), f"{self._target}/{part.name}")
        for name in self._names() - {part.name for part in parts}:
            if PART.fullmatch(name):  # of an earlier run of this output
                self._files.rm_file(f"{self._target}/{name}")

    def _check_owner(self, identity: dict[str, Any], *, overwrite: bool) -> None:
        there = self._names()
        if overwrite:
            if self._is_directory and not all(map(PART.fullmatch, there)):
                raise ConfigError(
                    f"outputs: {self._url} holds files that no job wrote. Give another path."
                )
        elif there and self._read_mark() != identity:
            raise ConfigError(
                f"outputs: {self._url} exists already and is not of this job. Give another "
                "output, or --overwrite to replace it."
            )

    def _names(self) -> set[str]:
        """What is there of an output."""
        if not self._is_directory:
            return {self._target} if self._files.exists(self._target) else set()
        try:
            found = self._files.find(self._target, maxdepth=1)
        except FileNotFoundError:
            return set()
        names = {path.rpartition("/")[2] for path in found}
        return names - {"_job.json"}

    def _read_mark(self) -> Any:
        try:
            return json.loads(self._files.cat_file(self._mark))
        except (FileNotFoundError, ValueError):
            return None

    def _make_parent(self, path: str) -> None:
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)


def deliver(outputs: OutputsConfig) -> None:
    """Brings a finished output to its URL, if it has one. Raises JaxInferError."""
    if is_url(outputs.path):
        Destination(outputs).bring(local_output(outputs))
