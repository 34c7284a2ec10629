"""Lines from files: every form, and everything that can be wrong with a line."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFile
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch import readers
from jaxinfer.batch.files import _LineCount, find_files
from jaxinfer.batch.job import check_inputs
from jaxinfer.batch.lines import BadLine, Line
from jaxinfer.batch.readers import JobReader
from jaxinfer.batch.records import bad_record, encode
from jaxinfer.config.job import InputsConfig
from jaxinfer.errors import ConfigError, JaxInferError
from tests.batch.echo import make_job, request_line


def read(
    *paths: Path | str, done: Callable[[int], bool] = lambda _: False, **inputs: Any
) -> list[Line | BadLine]:
    config = InputsConfig(path=[str(path) for path in paths], **inputs)
    return list(JobReader(config, find_files(config.path)).read(done))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_openai_lines(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", request_line(0) + "\n\r\n" + request_line(1).rstrip())
    first, second = read(file)
    assert isinstance(first, Line)
    assert first == Line(
        1, f"{file}:1", "r0", "/v1/completions", {"prompt": "say 0"}, first.num_bytes
    )
    assert (second.number, second.where) == (4, f"{file}:4"), "blank lines count, and are skipped"


@pytest.mark.parametrize(
    ("line", "custom_id", "words"),
    [
        (b"nonsense", None, "not JSON"),
        (b'{"custom_id": "a"', None, "not JSON"),
        (b"\xff\xfe", None, "not JSON"),
        (b"[" * 100_000, None, "nested too deeply"),
        (b"[1]", None, "not a JSON object but [1]"),
        (b"{}", None, "custom_id is missing"),
        (b'{"custom_id": 5}', None, "custom_id must be a text, got 5"),
        (b'{"custom_id": "a", "method": "GET"}', "a", 'method must be "POST", got "GET"'),
        (b'{"custom_id": "a", "method": "POST"}', "a", "url must be a text"),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/completions"}', "a", "body must be"),
        (b'{"custom_id": "a", "url": "/v1/x", "body": [1]}', "a", "body must be"),
    ],
)
def test_bad_lines_are_told_and_do_not_end_the_reading(
    line: bytes, custom_id: str | None, words: str, tmp_path: Path
):
    good = request_line(0).encode()
    file = write(tmp_path / "a.jsonl", good + line + b"\n" + good)
    first, bad, last = read(file)
    assert isinstance(first, Line)
    assert isinstance(last, Line)
    assert isinstance(bad, BadLine)
    assert (bad.number, bad.where, bad.custom_id) == (2, f"{file}:2", custom_id)
    assert words in bad.message


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    file = write(tmp_path / "a.jsonl", "x" * 5000 + "\n" + request_line(0) + "y" * 1001)
    too_long, good, last = read(file)
    assert isinstance(too_long, BadLine)
    assert "longer than 1000 bytes" in too_long.message
    assert isinstance(good, Line)
    assert good.number == 2
    assert isinstance(last, BadLine)


def test_text_is_a_prompt_a_line(tmp_path: Path):
    file = write(tmp_path / "a.txt", b"\xef\xbb\xbfone {x}\r\n\n\xff\n two \n")
    one, bad, two = read(file, mode="completion")
    assert isinstance(one, Line)
    assert (one.custom_id, one.body) == ("line-1", {"prompt": "one {x}"})
    assert isinstance(bad, BadLine)
    assert "not UTF-8" in bad.message
    assert isinstance(two, Line)
    assert (two.number, two.body) == (4, {"prompt": " two "})
    [chat, *_] = read(file, system="be brief")
    assert isinstance(chat, Line)
    assert chat.url == "/v1/chat/completions"
    assert chat.body == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one {x}"},
        ]
    }


def test_numbers_go_on_from_file_to_file_and_done_lines_are_skipped(tmp_path: Path):
    write(tmp_path / "b.txt", "b1\nb2\n")
    write(tmp_path / "a.txt", "a1\na2\na3")
    items = read(tmp_path / "*.txt", done={2, 4}.__contains__)
    assert [(item.number, item.where.rpartition("/")[2]) for item in items] == [
        (1, "a.txt:1"),
        (3, "a.txt:3"),
        (5, "b.txt:2"),
    ]


def test_gzip(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(request_line(3).encode()))
    [line] = read(tmp_path / "a.jsonl.gz")
    assert line.custom_id == "r3"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", b"nonsense\n", "Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"x" * 99)[:10], "ended before"),
        ("a.csv.gz", gzip.compress(b"t\nx\n")[:12], "ended before"),
        ("a.csv.gz", b"t\nx\n", "Not a gzipped file"),
        ("a.csv", b"x" * 5000 + b"\n", "field larger than field limit"),
    ],
)
def test_a_file_whose_beginning_cannot_be_read(
    name: str, content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    file = write(tmp_path / name, content)
    column: Any = {"column": "t"} if "csv" in name else {}
    with pytest.raises(ConfigError, match=f"{name} cannot be read .*{words}"):
        check_inputs(make_job(file, tmp_path / "out.jsonl", **column))


def test_a_file_that_cannot_be_read_on(tmp_path: Path):
    content = "".join(request_line(index) for index in range(2000)).encode()
    file = write(tmp_path / "a.jsonl.gz", gzip.compress(content)[:-100])
    assert check_inputs(make_job(file, tmp_path / "out.jsonl"))
    with pytest.raises(JaxInferError, match=r"a\.jsonl\.gz cannot be read on: .*Nothing is lost"):
        read(file)


def test_a_field_of_any_length_a_body_may_have(tmp_path: Path):
    file = write(tmp_path / "a.csv", "t\n" + "x" * 1_000_000 + "\nshort\n")
    long, short = read(file, column="t", mode="completion")
    assert isinstance(long, Line)
    assert len(long.body["prompt"]) == 1_000_000
    assert isinstance(short, Line)


def test_a_row_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    file = write(tmp_path / "a.csv", "t,u\n1,2\n" + "x" * 2500 + "\n3,4\n")
    first, *bad, last = read(file, column="t")
    assert (first.number, last.number) == (1, 5)
    assert ["field larger" in str(item) for item in bad] == [True, True, False]


def test_a_name_that_is_no_text(tmp_path: Path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    Path(path).write_bytes(b"\xff\n")
    [bad] = read(path)
    assert isinstance(bad, BadLine)
    assert bad.where.endswith(r"/\udcff.txt:1")
    encode(bad_record(bad))


def test_a_file_is_read_once_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a.txt", "one\n")
    (tmp_path / "b.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    names = ["a.txt", tmp_path / "a.txt", "./*.txt", tmp_path / "b.txt"]
    assert [item.where for item in read(*names)] == ["a.txt:1"]


@given(st.text(alphabet=" x\n\t", max_size=30), st.integers(1, 7))
def test_lines_that_are_not_blank_are_counted(text: str, piece: int):
    count = _LineCount()
    for start in range(0, len(text), piece):
        count.add(text[start : start + piece].encode())
    assert count.num_filled == sum(1 for line in text.split("\n") if line.strip())


ROWS = [
    {"id": 7, "title": "A", "text": "first"},
    {"id": 8, "title": None, "text": "second"},
    {"id": None, "title": "C", "text": "third"},
]


def write_rows(path: Path) -> Path:
    match path.suffix:
        case ".parquet":
            return write_parquet(path, ROWS)
        case ".csv":
            return write(path, 'id,title,text\n7,A,first\n\n8,"B\n\nb",second\n9,C\n,C,third\n')
        case _:
            return write(path, "\n".join(map(json.dumps, ROWS)))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_columns(name: str, tmp_path: Path):
    file = write_rows(tmp_path / name)
    items = read(file, template="{title}: {text} {{x}}", mode="completion", id_column="id")
    first, second, *_, last = items
    assert isinstance(first, Line)
    assert (first.custom_id, first.body) == ("7", {"prompt": "A: first {x}"})
    assert second.custom_id == "8"
    assert isinstance(last, Line)
    assert last.body == {"prompt": "C: third {x}"}
    if name == "a.csv":
        assert isinstance(second, Line)
        assert second.body == {"prompt": "B\n\nb: second {x}"}
        bad = items[2]
        assert isinstance(bad, BadLine)
        assert "2 fields and the header 3" in bad.message
    else:
        assert isinstance(second, BadLine)
        assert second.message == "column 'title' is empty."
        assert last.custom_id == "line-3"


def test_a_column_of_messages(tmp_path: Path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "name": "b"}]
    file = write_parquet(tmp_path / "a.parquet", [{"m": messages}])
    [line] = read(file, column="m")
    assert isinstance(line, Line)
    assert line.body == {"messages": messages}, "fields that a message did not have stay away"


def test_more_rows_than_are_read_at_once(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", [{"t": str(i)} for i in range(1000)])
    lines = read(file, column="t", mode="completion", done=lambda number: number % 2 == 0)
    assert [line.number for line in lines] == list(range(1, 1001, 2))
    assert isinstance(lines[-1], Line)
    assert lines[-1].body == {"prompt": "998"}


def test_a_cell_that_is_no_text(tmp_path: Path):
    bytes_ = pyarrow.array([b"one", b"\xff", b"two"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, bytes_.buffers())
    table = pyarrow.table({"t": text, "id": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    one, bad, two = read(tmp_path / "a.parquet", column="t", id_column="id")
    assert (one.custom_id, two.custom_id, two.number) == ("a", "c", 3)
    assert isinstance(bad, BadLine)
    assert "column 't' cannot be read: 'utf-8' codec can't decode" in bad.message


@pytest.mark.parametrize(
    ("name", "inputs", "words"),
    [
        ("none.jsonl", {}, ["there is no file"]),
        ("*.none", {}, ["there is no file"]),
        (".", {}, ["is a directory"]),
        ("a.xyz", {}, ["a.xyz", "inputs.format", "openai, text"]),
        ("a.parquet", {}, ["a.parquet", "has columns", "inputs.column"]),
        ("*.parquet", {}, ["a.parquet", "has columns"]),
        ("a.parquet", {"column": "tekst"}, ["no column 'tekst'", "Did you mean text?", "title"]),
        ("a.csv", {"template": "{titel}"}, ["no column 'titel'", "Did you mean title?"]),
        ("a.parquet", {"column": "text", "id_column": "ix"}, ["no column 'ix'"]),
        ("a.parquet", {"template": "{text.__class__}"}, ["no column 'text.__class__'"]),
        ("a.parquet", {"template": "{text!r}"}, ["{text}", "nothing more"]),
        ("a.parquet", {"template": "{text"}, ["inputs.template", "brace"]),
        ("a.parquet", {"template": "same"}, ["names no column"]),
        ("a.txt", {"column": "text"}, ["has no columns (format text)"]),
        ("a.jsonl", {"format": "openai", "id_column": "id"}, ["has no columns"]),
        ("a.jsonl", {"format": "openai", "system": "x"}, ["whole requests", "remove system"]),
        ("a.txt", {"format": "parquet", "column": "t"}, ["a.txt is not a Parquet file"]),
    ],
)
def test_inputs_that_cannot_be_used(
    name: str, inputs: dict[str, Any], words: list[str], tmp_path: Path
):
    for suffix in ("parquet", "csv", "jsonl"):
        write_rows(tmp_path / f"a.{suffix}")
    write(tmp_path / "a.txt", "x" * 100)
    write(tmp_path / "a.xyz", "x")
    with pytest.raises(ConfigError) as caught:
        check_inputs(make_job(tmp_path / name, tmp_path / "out.jsonl", **inputs))
    for word in words:
        assert word in str(caught.value)


def test_urls(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.pipe_file(f"/batch-readers/{name}.txt", f"from {name}\n".encode())
    items = read("memory://batch-readers/*.txt", mode="completion")
    assert [item.body for item in items if isinstance(item, Line)] == [
        {"prompt": "from a"},
        {"prompt": "from b"},
    ]
    with pytest.raises(ConfigError, match="there is no file"):
        read("memory://batch-readers/none.txt")
    with pytest.raises(ConfigError, match="cannot be looked up"):
        read("nosuchscheme://x/y.txt")


class PayloadError(Exception):
    """As aiohttp's, which fsspec lets pass."""


def test_a_url_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/batch-readers/c.jsonl", request_line(0).encode() * 100)
    url = "memory://batch-readers/c.jsonl"
    assert len(read(url)) == 100

    def fail(*_: Any) -> bytes:
        raise PayloadError("Response payload is not completed")

    monkeypatch.setattr(MemoryFile, "read", fail)
    words = r"c\.jsonl cannot be read on: PayloadError: Response payload .*Nothing is lost"
    with pytest.raises(JaxInferError, match=words):
        read(url)
