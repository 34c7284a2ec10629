"""A job's ends fit together: the same input, the right totals, outputs that are URLs."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
import pytest

from jaxinfer.batch.delivery import deliver
from jaxinfer.batch.job import check_inputs, open_job
from jaxinfer.config.job import JobConfig, OutputsConfig
from jaxinfer.config.schema import EngineConfig, ModelConfig, SchedulerConfig
from jaxinfer.errors import ConfigError, JaxInferError
from tests.batch.echo import make_job, run_echo, write_requests

MEMORY = fsspec.filesystem("memory")
ToUrl = Callable[..., JobConfig]


@pytest.fixture
def job(tmp_path: Path) -> JobConfig:
    return make_job(write_requests(tmp_path / "in.jsonl", 10), tmp_path / "out.jsonl")


def with_engine(job: JobConfig, **parts: Any) -> JobConfig:
    return replace(job, batch=replace(job.batch, engine=EngineConfig(**parts)))


def test_a_finished_job_does_nothing_more(job: JobConfig):
    assert run_echo(job).num_ok == 10
    content = Path(job.outputs.path).read_bytes()
    with open_job(job, check_inputs(job), overwrite=False) as opened:
        assert (opened.is_finished, opened.num_before, opened.total) == (True, 10, 10)
    assert Path(job.outputs.path).read_bytes() == content


def test_another_input_is_refused_wherever_it_differs(job: JobConfig, tmp_path: Path):
    run_echo(job)
    source = tmp_path / "in.jsonl"
    whole = source.read_bytes()
    for changed in (whole + b"\n", whole[:-2], whole.replace(b"say 5", b"say 6")):
        source.write_bytes(changed)
        with pytest.raises(ConfigError, match="begun with other inputs"):
            run_echo(job)
    source.write_bytes(whole)
    os.utime(source, (1, 1))
    assert run_echo(job).num_done == 0, "the same bytes are the same input"
    moved = source.rename(tmp_path / "moved.jsonl")
    assert run_echo(make_job(moved, job.outputs.path)).num_done == 0


def test_what_answers_depend_on_must_not_change(job: JobConfig):
    run_echo(job)
    changes = {
        "model": with_engine(job, model=ModelConfig(model="other")),
        "dtype": with_engine(job, model=ModelConfig(dtype="bfloat16")),
        "sampling": replace(job, sampling={"temperature": 0}),
        "inputs.mode": replace(job, inputs=replace(job.inputs, mode="completion")),
    }
    for name, changed in changes.items():
        with pytest.raises(ConfigError, match=f"begun with other {name}"):
            run_echo(changed)
    faster = with_engine(job, scheduler=SchedulerConfig(max_num_seqs=3))
    assert run_echo(faster).num_done == 0


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("in.jsonl", "in.jsonl"),
        ("*.jsonl", "in.jsonl"),
        ("in.jsonl", "sub/../in.jsonl"),
        ("link.jsonl", "in.jsonl"),
        ("in.jsonl", "link.jsonl"),
        ("hard.jsonl", "in.jsonl"),
        ("linked/in.jsonl", "in.jsonl"),
        ("a[1].jsonl", "sub/../a[1].jsonl"),
        ("in.jsonl", "file://{}/in.jsonl"),
        ("file://{}/in.jsonl", "linked/in.jsonl"),
        ("in.jsonl.job", "in.jsonl"),
        ("in.txt.jsonl", "in.txt"),
        ("parts.parquet/part-00000.parquet", "parts.parquet"),
        ("*.jsonl", "not-there-yet.jsonl"),
        ("linked/*.jsonl", "not-there-yet.jsonl"),
        ("sub/../**/*.jsonl", "sub/not-there-yet.jsonl"),
        ("**/*", "not-there-yet.parquet"),
    ],
)
def test_an_output_among_the_inputs(source: str, target: str, tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "parts.parquet").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path)
    for name in ("in.jsonl", "a[1].jsonl", "in.jsonl.job", "in.txt.jsonl"):
        write_requests(tmp_path / name, 3)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "in.jsonl")
    table = pyarrow.table({"t": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "parts.parquet" / "part-00000.parquet")
    ends = [end.format(tmp_path) if "{}" in end else tmp_path / end for end in (source, target)]
    with pytest.raises(ConfigError, match="is one of the inputs"):
        check_inputs(make_job(*ends))


def test_an_output_beside_the_inputs(tmp_path: Path):
    write_requests(tmp_path / "in.jsonl", 3)
    (tmp_path / "in.parquet").write_text("x")
    for source, target in (("in.jsonl", "out.jsonl"), ("*.parquet", "x.parquet"), ("i*", "o")):
        job = make_job(tmp_path / source, tmp_path / target, format="text")
        assert check_inputs(job)


def test_totals(tmp_path: Path):
    table = pyarrow.table({"t": ["x"] * 700})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    inputs = make_job(tmp_path / "a.parquet", tmp_path / "out.jsonl", column="t")
    with open_job(inputs, check_inputs(inputs), overwrite=True) as opened:
        assert opened.total == 700
    inputs = make_job(tmp_path / "a.txt", tmp_path / "out.jsonl")
    with open_job(inputs, check_inputs(inputs), overwrite=True) as opened:
        assert opened.total == 2, "blank lines are no work"
    (tmp_path / "a.csv").write_text('t\none\n\n"two\n\nlines"\n')
    inputs = make_job(tmp_path / "a.csv", tmp_path / "out.jsonl", column="t")
    with open_job(inputs, check_inputs(inputs), overwrite=True) as opened:
        assert opened.total == 2


@pytest.fixture
def to_url(job: JobConfig, tmp_path: Path) -> Iterator[ToUrl]:
    """Makes jobs of `job` that write to a URL."""

    def make(path: str, **outputs: Any) -> JobConfig:
        outputs = {"rows_per_file": 4, "work_dir": str(tmp_path / "work"), **outputs}
        return replace(job, outputs=OutputsConfig(path=f"memory://out/{path}", **outputs))

    yield make
    if MEMORY.exists("/out"):
        MEMORY.rm("/out", recursive=True)


def names_in(path: str) -> list[str]:
    return sorted(name.rpartition("/")[2] for name in MEMORY.ls(path, detail=False))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_urls(name: str, to_url: ToUrl, tmp_path: Path):
    MEMORY.pipe_file("/in/in.jsonl", (tmp_path / "in.jsonl").read_bytes())
    job = to_url(name)
    job = replace(job, inputs=replace(job.inputs, path=["memory://in/in.jsonl"]))
    assert run_echo(job).num_ok == 10
    assert names_in("/out") in ([name + ".job"], ["a.parquet"]), "claimed"
    for _ in range(2):
        deliver(job.outputs)
        if name == "a.parquet":
            parts = [f"part-0000{index}.parquet" for index in range(3)]
            assert names_in("/out/a.parquet") == ["_job.json", *parts]
        else:
            assert names_in("/out") == [name, name + ".job"]
            assert MEMORY.cat(f"/out/{name}").count(b"\n") == 10
        assert run_echo(job).num_done == 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_what_others_wrote_to_a_url_is_not_touched(name: str, to_url: ToUrl, tmp_path: Path):
    others = "/out/a.jsonl" if name == "a.jsonl" else "/out/a.parquet/part-00007.parquet"
    MEMORY.pipe_file(others, b"precious")
    job = to_url(name)
    with pytest.raises(ConfigError, match=r"exists already and is not of this job.*--overwrite"):
        run_echo(job)
    assert MEMORY.cat(others) == b"precious"
    with open_job(job, check_inputs(job), overwrite=True):
        pass
    assert run_echo(job).num_ok == 10
    deliver(job.outputs)
    assert not MEMORY.exists(others) or MEMORY.cat(others) != b"precious", "no stale part stays"
    outputs = to_url(name, work_dir=str(tmp_path / "other")).outputs
    changed = replace(job, sampling={"seed": 1}, outputs=outputs)
    with pytest.raises(ConfigError, match="is not of this job"):
        run_echo(changed)
    if name == "a.parquet":
        MEMORY.pipe_file("/out/a.parquet/mine.csv", b"precious")
        with (
            pytest.raises(ConfigError, match="files that no job wrote"),
            open_job(job, check_inputs(job), overwrite=True),
        ):
            pass


def test_places_that_cannot_be_written(to_url: ToUrl, monkeypatch: pytest.MonkeyPatch):
    job = to_url("x")
    with pytest.raises(ConfigError, match="cannot be used .*nosuch"):
        check_inputs(replace(job, outputs=replace(job.outputs, path="nosuch://x/y")))

    class Refused(Exception):
        """As botocore's and others': of no common kind."""

    def refuse(*_: Any, **__: Any) -> None:
        raise Refused("no credentials")

    job = to_url("a.jsonl")
    monkeypatch.setattr(type(MEMORY), "pipe_file", refuse)
    with pytest.raises(ConfigError, match="cannot be written .*Refused: no credentials"):
        run_echo(job)
    monkeypatch.undo()
    run_echo(job)
    monkeypatch.setattr(type(MEMORY), "put_file", refuse)
    with pytest.raises(JaxInferError, match=r"complete in .*work/.*a\.jsonl.*no credentials"):
        deliver(job.outputs)
