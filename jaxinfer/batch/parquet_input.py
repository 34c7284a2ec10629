"""Rows of Parquet files, a few at a time. Needs pyarrow; knows nothing of prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxinfer.batch.extras import pyarrow, pyarrow_parquet
from jaxinfer.batch.files import InputFile
from jaxinfer.errors import ConfigError, JaxInferError

_ROWS_AT_ONCE = 256


@contextmanager
def _open(file: InputFile) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; it does not close what it reads from."""
    parquet = pyarrow_parquet(file.path)
    with file.open() as stream:
        try:
            opened = parquet.ParquetFile(stream)
        except pyarrow().ArrowInvalid as error:
            raise ConfigError(f"inputs: {file.path} is not a Parquet file: {error}.") from error
        yield opened


def column_names(file: InputFile) -> list[str]:
    """Raises ConfigError for what is no Parquet file."""
    with _open(file) as opened:
        return list(opened.schema_arrow.names)


def num_rows(file: InputFile) -> int:
    """From the footer: nothing else is read."""
    with _open(file) as opened:
        return opened.metadata.num_rows


def rows(file: InputFile, columns: list[str]) -> Iterator[dict[str, Any] | str]:
    """The rows in order, with these columns only; of one that cannot be read, why."""
    try:
        with _open(file) as opened:
            for batch in opened.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                yield from _values(batch)
    except pyarrow().ArrowException as error:
        raise JaxInferError(f"inputs: {file.path} is damaged: {error}.") from error


def _values(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of a RecordBatch as Python has them."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # one cell of all: text that is no UTF-8, a date too far
        return [_row(batch, index) for index in range(batch.num_rows)]


def _row(batch: Any, index: int) -> dict[str, Any] | str:
    row: dict[str, Any] = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[index].as_py()
        except (ValueError, OverflowError) as error:
            return f"column {name!r} cannot be read: {error}."
    return row
