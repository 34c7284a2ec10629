"""A job's ends fit together: the same input, the right totals, outputs that are URLs."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
import pytest

from jaxinfer.batch.job import check_inputs, deliver, open_job
from jaxinfer.config.job import JobConfig, OutputsConfig
from jaxinfer.config.schema import EngineConfig, ModelConfig, SchedulerConfig
from jaxinfer.errors import ConfigError
from tests.batch.echo import make_job, run_echo, write_requests


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


def test_an_output_among_the_inputs(tmp_path: Path):
    write_requests(tmp_path / "in.jsonl", 3)
    for source in ("in.jsonl", "*.jsonl"):
        with pytest.raises(ConfigError, match="is one of the inputs"):
            check_inputs(make_job(tmp_path / source, tmp_path / "in.jsonl"))
    with pytest.raises(ConfigError, match="is one of the inputs"):
        check_inputs(make_job(tmp_path / "*.jsonl", tmp_path / "not-there-yet.jsonl"))


def test_totals(tmp_path: Path):
    table = pyarrow.table({"t": ["x"] * 700})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    inputs = make_job(tmp_path / "a.parquet", tmp_path / "out.jsonl", column="t")
    with open_job(inputs, check_inputs(inputs), overwrite=True) as opened:
        assert opened.total == 700
    inputs = make_job(tmp_path / "a.txt", tmp_path / "out.jsonl")
    with open_job(inputs, check_inputs(inputs), overwrite=True) as opened:
        assert opened.total == 3


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_urls(format_: Any, job: JobConfig, tmp_path: Path):
    memory = fsspec.filesystem("memory")
    url = f"memory://batch-job/{format_}/out"
    outputs = OutputsConfig(
        path=url, format=format_, rows_per_file=4, work_dir=str(tmp_path / "work")
    )
    memory.pipe_file("/batch-job/in.jsonl", (tmp_path / "in.jsonl").read_bytes())
    job = replace(
        job, inputs=replace(job.inputs, path=["memory://batch-job/in.jsonl"]), outputs=outputs
    )
    assert run_echo(job).num_ok == 10
    assert not memory.exists(f"/batch-job/{format_}")
    deliver(job.outputs)
    if format_ == "jsonl":
        assert memory.cat(f"/batch-job/{format_}/out").count(b"\n") == 10
    else:
        assert len(memory.ls(f"/batch-job/{format_}/out", detail=False)) == 3
