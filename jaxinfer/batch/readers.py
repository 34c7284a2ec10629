"""Reading lines out of files, one at a time: OpenAI's batch form, plain prompts, rows of columns.

A line that cannot be used comes as a BadLine and never ends the reading. Nothing is kept of what
was read. Knows forms of files; nothing of engines or outputs.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import msgspec

from jaxinfer.batch.files import READ_ERRORS, Fingerprint, InputFile, shown_path
from jaxinfer.batch.lines import BadLine, Line
from jaxinfer.batch.prompts import PromptMaker, UnusableRow
from jaxinfer.config.job import InputFormat, InputsConfig, input_format
from jaxinfer.errors import ConfigError, JaxInferError

MAX_LINE_BYTES = 32 * 2**20  # the server's limit of a body
_MAX_SHOWN = 100

IsDone = Callable[[int], bool]
Item = Line | BadLine


class _Spot(NamedTuple):
    """Where the reading is: number in the job, and place for people."""

    number: int
    where: str


class JobReader:
    """The lines of all files of a job, in order. A `Reader`."""

    def __init__(self, inputs: InputsConfig, files: list[InputFile]) -> None:
        self._inputs = inputs
        self._files = files
        self._prompts = PromptMaker(inputs)

    def check(self) -> None:
        """Raises ConfigError for a file that cannot be read, or lacks a column that is needed."""
        for file in self._files:
            try:
                columns = self._columns_of(file)
            except (*READ_ERRORS, csv.Error) as error:
                raise ConfigError(f"inputs: {file.path} cannot be read ({error}).") from error
            if columns is not None:
                self._prompts.check_columns(file.path, columns)

    def _columns_of(self, file: InputFile) -> list[str] | None:
        match input_format(self._inputs, file.path):
            case "parquet":
                from jaxinfer.batch.parquet_input import column_names

                return column_names(file)
            case "csv":
                with _csv_text(file) as text:
                    return next(_csv_rows(text), None)
        if file.path.endswith(".gz"):
            with file.open() as stream:
                stream.read(1)  # what is not packed shows at its first byte
        return None  # objects may differ from line to line: it shows when they are read

    def num_lines(self, file: InputFile, told: Fingerprint) -> int | None:
        """How many there are to answer; None where counting is not cheap."""
        match input_format(self._inputs, file.path):
            case "parquet":
                from jaxinfer.batch.parquet_input import num_rows

                return num_rows(file)
            case "csv":
                return None if told.num_lines is None else _num_csv_rows(file)
        return told.num_lines

    def read(self, is_done: IsDone) -> Iterator[Item]:
        """See `Reader.read`."""
        base = 0
        for file in self._files:
            last = base
            try:
                for last, item in self._read_file(file, base, is_done):  # noqa: B007 - used below
                    if item is not None:
                        yield item
            except READ_ERRORS as error:
                raise JaxInferError(
                    f"inputs: {file.path} cannot be read on: {error}. Nothing is lost: repair that "
                    "and start the same command again."
                ) from error
            base = last

    def _read_file(
        self, file: InputFile, base: int, is_done: IsDone
    ) -> Iterator[tuple[int, Item | None]]:
        """Each line's number, and the line unless it is blank or done."""
        format_ = input_format(self._inputs, file.path)
        if format_ == "parquet":
            from jaxinfer.batch.parquet_input import rows

            yield from self._read_rows(rows(file, self._prompts.columns), file, base, is_done)
        elif format_ == "csv":
            with _csv_text(file) as text:
                yield from self._read_rows(_csv_dicts(text), file, base, is_done)
        else:
            parse, shown = self._parser(format_), shown_path(file.path)
            with file.open() as stream:
                for index, raw in enumerate(_raw_lines(stream), 1):
                    spot = _Spot(base + index, f"{shown}:{index}")
                    is_wanted = not is_done(spot.number) and (raw is None or raw.strip())
                    yield spot.number, _parse(parse, raw, spot) if is_wanted else None

    def _read_rows(
        self,
        found: Iterator[Mapping[str, Any] | str],
        file: InputFile,
        base: int,
        is_done: IsDone,
    ) -> Iterator[tuple[int, Item | None]]:
        shown = shown_path(file.path)
        for index, row in enumerate(found, 1):
            spot = _Spot(base + index, f"{shown}: row {index}")
            yield spot.number, None if is_done(spot.number) else self._of_row(row, spot)

    def _parser(self, format_: InputFormat) -> "Callable[[bytes, _Spot], Item]":
        match format_:
            case "openai":
                return _openai_line
            case "text":
                return self._text_line
            case _:
                return self._object_line

    def _text_line(self, raw: bytes, spot: _Spot) -> Item:
        try:
            prompt = raw.decode("utf-8-sig" if spot.where.endswith(":1") else "utf-8")
        except UnicodeDecodeError as error:
            return BadLine(spot.number, spot.where, f"line-{spot.number}", f"not UTF-8: {error}.")
        return self._line(spot, f"line-{spot.number}", self._prompts.of_text(prompt), len(raw))

    def _object_line(self, raw: bytes, spot: _Spot) -> Item:
        row = _decode(raw)
        return self._of_row(row, spot)

    def _of_row(self, row: Mapping[str, Any] | str, spot: _Spot) -> Item:
        """`row` may be the reason why it is none."""
        if isinstance(row, str):
            return BadLine(spot.number, spot.where, f"line-{spot.number}", row)
        custom_id = self._prompts.custom_id(row, spot.number)
        try:
            body = self._prompts.of_row(row)
        except UnusableRow as error:
            return BadLine(spot.number, spot.where, custom_id, str(error))
        return self._line(spot, custom_id, body, sum(len(str(value)) for value in row.values()))

    def _line(self, spot: _Spot, custom_id: str, body: dict[str, Any], num_bytes: int) -> Line:
        return Line(spot.number, spot.where, custom_id, self._prompts.url, body, num_bytes)


# --------------------------------------------------------------------------- lines of a file


def _raw_lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is too long to be held."""
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        if len(raw) <= MAX_LINE_BYTES or raw.endswith(b"\n"):
            yield raw.rstrip(b"\r\n")
            continue
        while raw and not raw.endswith(b"\n"):
            raw = stream.readline(MAX_LINE_BYTES)
        yield None


def _parse(parse: Callable[[bytes, _Spot], Item], raw: bytes | None, spot: _Spot) -> Item:
    if raw is None:
        message = f"the line is longer than {MAX_LINE_BYTES} bytes."
        return BadLine(spot.number, spot.where, None, message)
    return parse(raw, spot)


def _decode(raw: bytes) -> dict[str, Any] | str:
    """A JSON object, or why it is none."""
    try:
        value = msgspec.json.decode(raw.removeprefix(b"\xef\xbb\xbf"))
    except RecursionError:
        return "nested too deeply."
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return f"not JSON: {error}."
    return value if isinstance(value, dict) else f"not a JSON object but {_shown(value)}."


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _openai_line(raw: bytes, spot: _Spot) -> Item:
    """A line {custom_id, method, url, body}."""
    value = _decode(raw)
    if isinstance(value, str):
        return BadLine(spot.number, spot.where, None, value)
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        shown = "is missing" if custom_id is None else f"must be a text, got {_shown(custom_id)}"
        return BadLine(spot.number, spot.where, None, f"custom_id {shown}.")
    problem = _openai_problem(value)
    if problem is not None:
        return BadLine(spot.number, spot.where, custom_id, problem)
    return Line(spot.number, spot.where, custom_id, value["url"], value["body"], len(raw))


def _openai_problem(value: Mapping[str, Any]) -> str | None:
    if value.get("method", "POST") != "POST":
        return f'method must be "POST", got {_shown(value["method"])}.'
    if not isinstance(value.get("url"), str):
        return f"url must be a text such as /v1/chat/completions, got {_shown(value.get('url'))}."
    if not isinstance(value.get("body"), dict):
        return f"body must be a JSON object, got {_shown(value.get('body'))}."
    return None


# ---------------------------------------------------------------------------------------- CSV


def _csv_text(file: InputFile) -> io.TextIOWrapper:
    """Bytes that are no text become marks: a row with them is still a row."""
    return io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="replace", newline="")


def _csv_rows(text: io.TextIOWrapper) -> "Iterator[list[str]]":
    """Rows; what has no line end for too long comes in pieces, which are no rows."""
    csv.field_size_limit(MAX_LINE_BYTES)  # (of the process; the usual one is 128 KiB)
    return csv.reader(iter(lambda: text.readline(MAX_LINE_BYTES + 1), ""))


def _num_csv_rows(file: InputFile) -> int:
    with _csv_text(file) as text:
        return sum(1 for _ in _csv_dicts(text))


def _csv_dicts(text: io.TextIOWrapper) -> Iterator[Mapping[str, Any] | str]:
    """Each row by the names of the first, or why it is no row."""
    rows = _csv_rows(text)
    names = next(rows, [])
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"not CSV: {error}."
            continue
        if not row:
            continue
        if len(row) == len(names):
            yield dict(zip(names, row, strict=True))
        else:
            yield f"the row has {len(row)} fields and the header {len(names)}."
