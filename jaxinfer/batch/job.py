"""A job's two ends: what is read and what is written, opened and found to fit together.

Knows configuration, readers and sinks; nothing of engines.
"""

import fnmatch
import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.batch.extras import fsspec_core
from jaxinfer.batch.files import Fingerprint, InputFile, find_files, fingerprint, is_url
from jaxinfer.batch.lines import BadLine, Line
from jaxinfer.batch.parquet_input import num_rows
from jaxinfer.batch.parquet_sink import ParquetSink
from jaxinfer.batch.readers import JobReader
from jaxinfer.batch.sinks import JsonlSink, Sink
from jaxinfer.config.env import cache_dir
from jaxinfer.config.fields import flatten
from jaxinfer.config.job import (
    JobConfig,
    OutputsConfig,
    check_columns,
    input_format,
    output_format,
)
from jaxinfer.errors import ConfigError, JaxInferError

# Settings of the model on which no answer depends.
_WITHOUT_EFFECT = ("download_dir", "load_format", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class OpenJob:
    """A job that may run: `lines` are those that are not done."""

    sink: Sink
    lines: Iterator[Line | BadLine]
    num_before: int  # lines that earlier runs did
    total: int | None  # lines of the inputs, blank ones too; None where that is not known
    is_finished: bool  # there is no line to do


def check_inputs(job: JobConfig) -> list[InputFile]:
    """The files of a job. Raises ConfigError for what is not there or lacks a column."""
    files = find_files(job.inputs.path)
    output = local_output(job.outputs).resolve()
    for path in (*job.inputs.path, *(file.path for file in files)):
        if not is_url(path) and fnmatch.fnmatchcase(str(output), str(_absolute(path))):
            raise ConfigError(
                f"outputs.path={job.outputs.path!r} is one of the inputs ({path}). Give another."
            )
    for file in files:
        check_columns(job.inputs, file.path)
    JobReader(job.inputs, files).check()
    return files


def _absolute(path: str) -> Path:
    return Path.cwd() / Path(path).expanduser()


@contextmanager
def open_job(job: JobConfig, files: list[InputFile], *, overwrite: bool) -> Iterator[OpenJob]:
    """Holds the claim on the output. `files` are `check_inputs`'s.

    Raises ConfigError for an output that is not this job's, or that another run writes.
    """
    prints = [fingerprint(file) for file in files]
    sink = _open_sink(job.outputs, _identity(job, prints), overwrite=overwrite)
    try:
        done = sink.done
        num_before = len(done)
        lines = JobReader(job.inputs, files).read(done.__contains__)
        first = next(lines, None)
        yield OpenJob(
            sink=sink,
            lines=itertools.chain([] if first is None else [first], lines),
            num_before=num_before,
            total=_total(job, files, prints),
            is_finished=first is None,
        )
    finally:
        sink.close()


def _identity(job: JobConfig, prints: list[Fingerprint]) -> dict[str, Any]:
    """What the answers depend on. Where files lie and how fast a job runs is not of it."""
    engine, making = job.batch.engine, flatten(job.inputs)
    model = {**flatten(engine.model), "kv_cache_dtype": engine.cache.kv_cache_dtype}
    return {
        "inputs": [told.as_json() for told in prints],
        **{f"inputs.{name}": value for name, value in making.items() if name != "path"},
        "sampling": job.sampling,
        **{name: value for name, value in model.items() if name not in _WITHOUT_EFFECT},
    }


def _total(job: JobConfig, files: list[InputFile], prints: list[Fingerprint]) -> int | None:
    total = 0
    for file, told in zip(files, prints, strict=True):
        if input_format(job.inputs, file.path) == "parquet":
            total += num_rows(file)
        elif told.num_lines is None:
            return None
        else:
            total += told.num_lines
    return total


# ----------------------------------------------------------------------------------- output


def local_output(outputs: OutputsConfig) -> Path:
    """Where answers are kept while the job runs: a URL cannot be appended to."""
    if not is_url(outputs.path):
        return Path(outputs.path).expanduser()
    digest = hashlib.sha256(outputs.path.encode()).hexdigest()[:16]
    directory = Path(outputs.work_dir) if outputs.work_dir else cache_dir() / "batch"
    return directory.expanduser() / digest / outputs.path.rstrip("/").rpartition("/")[2]


def _open_sink(outputs: OutputsConfig, identity: dict[str, Any], *, overwrite: bool) -> Sink:
    path = local_output(outputs)
    if is_url(outputs.path):
        fsspec_core(outputs.path)  # a missing library is known before any work
    if output_format(outputs) == "jsonl":
        return JsonlSink(path, identity, overwrite=overwrite)
    return ParquetSink(path, identity, rows_per_file=outputs.rows_per_file, overwrite=overwrite)


def deliver(outputs: OutputsConfig) -> None:
    """Brings a finished output to its URL. Raises JaxInferError."""
    if not is_url(outputs.path):
        return
    local = local_output(outputs)
    try:
        filesystem, target = fsspec_core(outputs.path).url_to_fs(outputs.path)
        for file in sorted(local.glob("part-*.parquet")) if local.is_dir() else [local]:
            inner = f"{target.rstrip('/')}/{file.name}" if local.is_dir() else target
            filesystem.makedirs(inner.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(file), inner)
    except (OSError, NotImplementedError) as error:
        raise JaxInferError(
            f"The answers are complete in {local}, but could not be brought to {outputs.path} "
            f"({error}). Start the same command again to try once more, or copy them."
        ) from error
