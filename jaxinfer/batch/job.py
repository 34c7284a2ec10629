"""A job's two ends: what is read and what is written, opened and found to fit together.

Knows configuration, readers and sinks; nothing of engines.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxinfer.batch.apart import check_apart
from jaxinfer.batch.delivery import Destination, local_output
from jaxinfer.batch.files import Fingerprint, InputFile, find_files, fingerprint, is_url
from jaxinfer.batch.lines import BadLine, Line
from jaxinfer.batch.parquet_sink import ParquetSink
from jaxinfer.batch.readers import JobReader
from jaxinfer.batch.sinks import JsonlSink, Sink
from jaxinfer.batch.text_sink import TextSink
from jaxinfer.config.fields import flatten
from jaxinfer.config.job import (
    JobConfig,
    OutputsConfig,
    check_columns,
    output_format,
)

# Settings of the model on which no answer depends.
_WITHOUT_EFFECT = ("download_dir", "load_format", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class OpenJob:
    """A job that may run: `lines` are those that are not done."""

    sink: Sink
    lines: Iterator[Line | BadLine]
    num_before: int  # lines that earlier runs did
    total: int | None  # lines of the inputs without blank ones; None where that is not known
    is_finished: bool  # there is no line to do


def check_inputs(job: JobConfig) -> list[InputFile]:
    """The files of a job. Raises ConfigError for what is not there or lacks a column, and for an
    output that cannot be."""
    if is_url(job.outputs.path):
        Destination(job.outputs)  # a missing package is known before any work
    files = find_files(job.inputs.path)
    check_apart(job.outputs, job.inputs.path, files)
    for file in files:
        check_columns(job.inputs, file.path)
    JobReader(job.inputs, files).check()
    return files


@contextmanager
def open_job(job: JobConfig, files: list[InputFile], *, overwrite: bool) -> Iterator[OpenJob]:
    """Holds the claim on the output. `files` are `check_inputs`'s.

    Raises ConfigError for an output that is not this job's, or that another run writes.
    """
    prints = [fingerprint(file) for file in files]
    identity = _identity(job, prints)
    sink = _open_sink(job.outputs, identity, overwrite=overwrite)
    try:
        if is_url(job.outputs.path):
            Destination(job.outputs).claim(identity, overwrite=overwrite)
        done = sink.done
        num_before = len(done)
        reader = JobReader(job.inputs, files)
        lines = reader.read(done.__contains__)
        first = next(lines, None)
        yield OpenJob(
            sink=sink,
            lines=itertools.chain([] if first is None else [first], lines),
            num_before=num_before,
            total=_total(reader, files, prints),
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


def _total(reader: JobReader, files: list[InputFile], prints: list[Fingerprint]) -> int | None:
    total = 0
    for file, told in zip(files, prints, strict=True):
        num_lines = reader.num_lines(file, told)
        if num_lines is None:
            return None
        total += num_lines
    return total


def _open_sink(outputs: OutputsConfig, identity: dict[str, Any], *, overwrite: bool) -> Sink:
    path = local_output(outputs)
    match output_format(outputs):
        case "jsonl":
            return JsonlSink(path, identity, overwrite=overwrite)
        case "text":
            return TextSink(path, identity, overwrite=overwrite)
    return ParquetSink(path, identity, rows_per_file=outputs.rows_per_file, overwrite=overwrite)
