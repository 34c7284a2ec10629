"""Outputs: what is kept through a kill, what is refused, and what a reader finds in them."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch.done import DoneIndex
from jaxinfer.batch.journal import Journal
from jaxinfer.batch.lines import BadLine, Line, Reply
from jaxinfer.batch.parquet_sink import ParquetSink
from jaxinfer.batch.records import bad_record, encode, record_of
from jaxinfer.batch.sinks import JsonlSink, Sink
from jaxinfer.batch.text_sink import TextSink
from jaxinfer.errors import ConfigError, JaxInferError
from tests.batch.echo import completion

JOB = {"inputs": [{"bytes": 1}], "model": "m"}

Open = Callable[..., Sink]


@pytest.fixture(params=["jsonl", "text", "parquet"])
def open_sink(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    def open_(*, job: Any = JOB, overwrite: bool = False) -> Sink:
        if request.param == "jsonl":
            return JsonlSink(tmp_path / "new" / "out.jsonl", job, overwrite=overwrite)
        if request.param == "text":
            return TextSink(tmp_path / "new" / "out.txt", job, overwrite=overwrite)
        path = tmp_path / "new" / "out.parquet"
        return ParquetSink(path, job, rows_per_file=3, overwrite=overwrite)

    return open_


def record(number: int) -> dict[str, Any]:
    line = Line(number, f"f:{number}", f"id{number}", "/v1/completions", {}, 1)
    reply = Reply(status=200, body=completion(f"text {number}"), request_id=f"q{number}")
    return record_of(line, reply)


def write_all(sink: Sink, *numbers: int) -> None:
    for number in numbers:
        sink.write(record(number))


@given(st.lists(st.integers(1, 3000)), st.lists(st.integers(1, 3000)))
def test_the_done_index_is_a_set(numbers: list[int], others: list[int]):
    index = DoneIndex()
    index.update(numbers)
    assert len(index) == len(set(numbers))
    assert [number in index for number in others] == [number in set(numbers) for number in others]


def test_what_was_written_is_done_when_it_is_opened_again(open_sink: Open):
    sink = open_sink()
    write_all(sink, 5, 2, 9, 1, 40_000)
    sink.close()
    sink = open_sink()
    assert len(sink.done) == 5
    assert all(number in sink.done for number in (5, 2, 9, 1, 40_000))
    assert 3 not in sink.done
    sink.close()


def test_an_output_has_one_writer(open_sink: Open):
    sink = open_sink()
    with pytest.raises(ConfigError, match="another run is writing"):
        open_sink()
    sink.close()
    open_sink().close()


def test_another_job_is_told_what_differs(open_sink: Open):
    sink = open_sink()
    write_all(sink, 1)
    sink.close()
    with pytest.raises(ConfigError, match='begun with other model: "m" then, "n" now') as caught:
        open_sink(job={**JOB, "model": "n"})
    assert "--overwrite" in str(caught.value)
    sink = open_sink(job={**JOB, "model": "n"}, overwrite=True)
    assert not len(sink.done)
    write_all(sink, 2)
    sink.close()
    sink = open_sink(job={**JOB, "model": "n"})
    assert 1 not in sink.done
    assert 2 in sink.done
    sink.close()


def test_a_claim_that_holds_is_not_written_again(open_sink: Open, tmp_path: Path):
    """A kill in the middle of that would leave an output that is nobody's."""
    sink = open_sink()
    write_all(sink, 1)
    sink.close()
    [claim] = [path for path in (tmp_path / "new").rglob("*") if "job" in path.name]
    before = claim.stat().st_mtime_ns
    os.utime(claim, ns=(1, 1))
    open_sink().close()
    assert before != claim.stat().st_mtime_ns == 1


def test_a_claim_cut_short_before_there_was_output(open_sink: Open, tmp_path: Path):
    open_sink().close()
    [claim] = [path for path in (tmp_path / "new").rglob("*") if "job" in path.name]
    claim.write_text('{"model": ')
    sink = open_sink()
    write_all(sink, 1)
    sink.close()
    open_sink().close()


def test_files_of_others_are_not_touched(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("precious\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.parquet").write_text("precious")
    with pytest.raises(ConfigError, match=r"a\.jsonl exists already"):
        JsonlSink(tmp_path / "a.jsonl", JOB, overwrite=False)
    with pytest.raises(ConfigError, match="exists already"):
        ParquetSink(tmp_path / "d", JOB, rows_per_file=1, overwrite=False)
    (tmp_path / "a.txt").write_text("precious\n")
    with pytest.raises(ConfigError, match=r"a\.txt exists already"):
        TextSink(tmp_path / "a.txt", JOB, overwrite=False)
    assert (tmp_path / "a.txt").read_text() == "precious\n"
    with pytest.raises(ConfigError, match="is a file"):
        ParquetSink(tmp_path / "a.jsonl", JOB, rows_per_file=1, overwrite=False)
    with pytest.raises(ConfigError, match="holds files that no job wrote"):
        ParquetSink(tmp_path / "d", JOB, rows_per_file=1, overwrite=True)
    assert (tmp_path / "a.jsonl").read_text() == "precious\n"
    assert (tmp_path / "d" / "x.parquet").read_text() == "precious"


def test_an_output_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        JsonlSink(tmp_path / "file" / "out.jsonl", JOB, overwrite=False)
    (tmp_path / "directory").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is a directory"):
            JsonlSink(tmp_path / "directory", JOB, overwrite=overwrite)
        with pytest.raises(ConfigError, match="is a directory"):
            TextSink(tmp_path / "directory", JOB, overwrite=overwrite)
    assert not list(tmp_path.glob("directory.*"))


def test_an_output_that_cannot_be_replaced(open_sink: Open, monkeypatch: pytest.MonkeyPatch):
    """(Root may do anything, so a read-only place is played.)"""
    sink = open_sink()
    write_all(sink, 1, 2)
    sink.close()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(ConfigError, match="cannot be written .*Permission denied"):
        open_sink(overwrite=True)
    monkeypatch.undo()
    sink = open_sink()
    assert len(sink.done) == 2
    sink.close()


# --------------------------------------------------------------------------------- journal


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines(tmp_path: Path):
    lines = [encode(record(number)) for number in (3, 1, 2)]
    whole = b"".join(lines)
    path = tmp_path / "j"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        done = DoneIndex()
        journal = Journal(path, done)
        num_whole = whole[:size].count(b"\n")
        assert journal.num_records == len(done) == num_whole
        journal.append(encode(record(7)))
        journal.drop()
        assert path.read_bytes() == b"".join(lines[:num_whole]) + encode(record(7))


def test_rubbish_at_the_end_is_cut_and_elsewhere_is_not(tmp_path: Path):
    path = tmp_path / "j"
    good = encode(record(1))
    path.write_bytes(good + b"\0\0\n\0\n\0")
    Journal(path, DoneIndex()).close()
    assert path.read_bytes() == good
    for rubbish in (b"{}\n", b'{"line": 0}\n', b"\xff\n"):
        path.write_bytes(good + rubbish + good)
        with pytest.raises(ConfigError, match=r"line 2 of .* is damaged"):
            Journal(path, DoneIndex())
        assert path.read_bytes() == good + rubbish + good


def test_a_full_disk_leaves_a_journal_that_can_be_continued(tmp_path: Path):
    """A limit on the size of files stands in for the disk: the kernel writes what fits."""
    import resource
    import signal

    path = tmp_path / "j"
    journal = Journal(path, DoneIndex())
    journal.append(encode(record(1)))
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(JaxInferError, match="cannot be written .* Nothing is lost"):
            journal.append(encode(record(2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert path.stat().st_size == size
    journal.append(encode(record(3)))
    journal.close()
    done = DoneIndex()
    Journal(path, done).close()
    assert (1 in done, 2 in done, 3 in done) == (True, False, True)


# ------------------------------------------------------------------------------ plain text


def test_line_n_of_a_text_answers_line_n(tmp_path: Path):
    path = tmp_path / "out.txt"

    def reply(number: int, text: str) -> dict[str, Any]:
        line = Line(number, f"f:{number}", f"id{number}", "/v1/completions", {}, 1)
        return record_of(line, Reply(status=200, body=completion(text), request_id="q"))

    sink = TextSink(path, JOB, overwrite=False)
    sink.write(reply(5, "five"))
    sink.write(reply(2, "two\n lines\r\n and \\n"))
    sink.close()
    assert not path.exists(), "it is there when it is whole"
    sink = TextSink(path, JOB, overwrite=False)
    sink.write(bad_record(BadLine(3, "f:3", None, "not JSON.")))
    sink.write(reply(1, ""))
    for _ in range(2):
        sink.finish()
        expected = "\ntwo\\n lines\\r\\n and \\\\n\n\n\nfive\n"
        assert path.read_bytes() == expected.encode()
        sink.close()
        sink = TextSink(path, JOB, overwrite=False)
    assert len(sink.done) == 4
    path.write_text("edited")
    with pytest.raises(JaxInferError, match="was changed or written by others"):
        sink.finish()
    assert path.read_text() == "edited"
    sink.close()
    TextSink(path, JOB, overwrite=True).close()
    assert not path.exists()


# --------------------------------------------------------------------------------- Parquet


def parquet_sink(path: Path) -> ParquetSink:
    return ParquetSink(path, JOB, rows_per_file=3, overwrite=False)


def lines_in(path: Path) -> list[int]:
    return pyarrow.parquet.read_table(path).column("line").to_pylist()


def test_parquet_files_and_their_columns(tmp_path: Path):
    path = tmp_path / "out.parquet"
    sink = parquet_sink(path)
    write_all(sink, 3, 1, 2, 9)
    bad = bad_record(BadLine(4, "f:4", None, "not JSON."))
    sink.write(bad)
    sink.finish()
    sink.close()
    assert sorted(file.name for file in path.iterdir()) == [
        "_job.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert lines_in(path / "part-00000.parquet") == [1, 2, 3], "in order of line"
    first, *_, failed, _ = pyarrow.parquet.read_table(path).to_pylist()
    assert first == {
        "line": 1,
        "custom_id": "id1",
        "text": "text 1",
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "status_code": 200,
        "error": None,
        "response": first["response"],
    }
    assert json.loads(first["response"]) == completion("text 1")
    assert (failed["line"], failed["status_code"], failed["error"]) == (4, 400, "f:4: not JSON.")


def test_a_kill_between_a_part_and_the_end_of_its_segment(tmp_path: Path):
    path = tmp_path / "out.parquet"
    sink = parquet_sink(path)
    write_all(sink, 1, 2, 3, 4)
    sink.close()
    segment = b"".join(encode(record(number)) for number in (1, 2, 3))
    (path / "_segment-00000.jsonl").write_bytes(segment)
    (path / "part-00001.parquet.tmp").write_bytes(b"half")
    sink = parquet_sink(path)
    assert len(sink.done) == 4
    write_all(sink, 5, 6, 7)
    sink.finish()
    sink.close()
    assert sorted(lines_in(path)) == [1, 2, 3, 4, 5, 6, 7]
    assert not [*path.glob("*.tmp"), *path.glob("_segment-*")]


def test_a_kill_after_a_full_segment_and_before_its_part(tmp_path: Path):
    path = tmp_path / "out.parquet"
    parquet_sink(path).close()
    for index in (0, 1):
        numbers = range(3 * index + 1, 3 * index + 4)
        content = b"".join(encode(record(number)) for number in numbers)
        (path / f"_segment-{index:05d}.jsonl").write_bytes(content)
    sink = parquet_sink(path)
    assert len(sink.done) == 6
    sink.finish()
    sink.close()
    assert sorted(lines_in(path)) == [1, 2, 3, 4, 5, 6]


def test_a_damaged_part_is_named(tmp_path: Path):
    path = tmp_path / "out.parquet"
    sink = parquet_sink(path)
    write_all(sink, 1, 2, 3)
    sink.close()
    (path / "part-00000.parquet").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"part-00000\.parquet is damaged.*Remove it"):
        parquet_sink(path)
