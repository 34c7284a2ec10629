"""The work itself: every line once, bounded, through refusals, failures and stops."""

import asyncio
import errno
import json
from collections import Counter
from pathlib import Path

import pytest

from jaxinfer.batch import pump
from jaxinfer.batch.job import check_inputs, open_job
from jaxinfer.batch.lines import Line, Reply
from jaxinfer.batch.pump import Counts
from jaxinfer.errors import EngineDeadError, JaxInferError
from tests.batch.echo import (
    completion,
    echo,
    make_job,
    pump_of,
    request_line,
    run_echo,
    write_requests,
)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(status: int, *, retry_after_s: float | None = None, lost_engine: bool = False) -> Reply:
    body = {"error": {"message": f"status {status}", "code": status}}
    return Reply(
        status=status,
        body=body,
        request_id="q",
        retry_after_s=retry_after_s,
        lost_engine=lost_engine,
    )


class FragileEngine:
    """An engine that some lines end: all that are in work then tell of it."""

    def __init__(self, killers: set[int]) -> None:
        self.killers = killers
        self.num_losses = 0
        self.in_work: set[int] = set()
        self.last_beside: dict[int, set[int]] = {}  # what a killer took with it, the last time

    async def answer(self, line: Line) -> Reply:
        before = self.num_losses
        self.in_work.add(line.number)
        await asyncio.sleep(0.002)
        if self.num_losses == before and line.number in self.killers:
            self.num_losses += 1
            self.last_beside[line.number] = self.in_work - {line.number}
            self.in_work.clear()
        self.in_work.discard(line.number)
        if self.num_losses != before:
            return refused(503, retry_after_s=0.001, lost_engine=True)
        return await echo(line)


def test_every_line_gets_one_record_and_bad_ones_stop_nothing(tmp_path: Path):
    lines = [request_line(index) for index in range(150)]
    lines[10], lines[20], lines[149] = "nonsense\n", "\n", '{"custom_id": "half"'
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(lines))

    async def answer(line: Line) -> Reply:
        return refused(400) if line.number == 31 else await echo(line)

    counts = run_echo(make_job(source, target), answer)
    assert (counts.num_ok, counts.num_failed, counts.num_in_work) == (146, 3, 0)
    assert (counts.num_prompt_tokens, counts.num_output_tokens) == (2 * 146, 3 * 146)
    found = {record["line"]: record for record in records(target)}
    assert found.keys() == set(range(1, 151)) - {21}
    assert found[1] == {
        "id": "batch_req_1",
        "custom_id": "r0",
        "line": 1,
        "response": {"status_code": 200, "request_id": "1", "body": completion("say 0")},
        "error": None,
    }
    assert found[31]["response"]["status_code"] == 400
    assert found[31]["error"] == {"message": "status 400", "code": 400}
    assert found[11]["custom_id"] is None
    assert found[11]["response"]["status_code"] == 400
    assert found[11]["error"]["message"].startswith(f"{source}:11: not JSON")


def test_as_many_at_once_as_allowed(tmp_path: Path):
    job = make_job(write_requests(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl")
    at_once: Counter[int] = Counter()
    num_running = 0

    async def answer(line: Line) -> Reply:
        nonlocal num_running
        num_running += 1
        at_once[num_running] += 1
        await asyncio.sleep(0.001)
        num_running -= 1
        return await echo(line)

    run_echo(job, answer, concurrency=5)
    assert max(at_once) == 5


def test_an_answer_is_in_the_file_when_it_is_there(tmp_path: Path):
    target = tmp_path / "out.jsonl"
    job = make_job(write_requests(tmp_path / "in.jsonl", 30), target)

    async def answer(line: Line) -> Reply:
        assert len(records(target)) == line.number - 1
        return await echo(line)

    run_echo(job, answer, concurrency=1)


def test_busy_is_no_answer(tmp_path: Path):
    job = make_job(write_requests(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl")
    asked: Counter[int] = Counter()

    async def answer(line: Line) -> Reply:
        asked[line.number] += 1
        is_first = asked[line.number] == 1
        return refused(503, retry_after_s=0.001) if is_first else await echo(line)

    assert run_echo(job, answer).num_ok == 20
    assert set(asked.values()) == {2}


def test_nothing_but_refusals_ends_the_job_and_it_can_go_on(tmp_path: Path):
    target = tmp_path / "out.jsonl"
    job = make_job(write_requests(tmp_path / "in.jsonl", 20), target)

    async def answer(line: Line) -> Reply:
        return refused(503, retry_after_s=0.01) if line.number > 5 else await echo(line)

    with (
        pytest.raises(EngineDeadError, match=r"status 503 Nothing is lost: start the same command"),
        open_job(job, check_inputs(job), overwrite=False) as opened,
    ):
        asyncio.run(pump_of(opened, answer, give_up_after_s=0.05).run())
    assert len(records(target)) == 5, "a line that was refused for the moment is not done"
    assert run_echo(job).num_ok == 15
    assert sorted(record["line"] for record in records(target)) == list(range(1, 21))


def test_a_stop_finishes_what_is_in_work_and_begins_nothing(tmp_path: Path):
    target = tmp_path / "out.jsonl"
    job = make_job(write_requests(tmp_path / "in.jsonl", 500), target)
    stop, begun = asyncio.Event(), []

    async def answer(line: Line) -> Reply:
        begun.append(line.number)
        if len(begun) == 20:
            stop.set()
        await asyncio.sleep(0.002)
        return await echo(line)

    with open_job(job, check_inputs(job), overwrite=False) as opened:
        asyncio.run(pump_of(opened, answer, stop=stop).run())
    assert len(begun) == 20
    assert sorted(record["line"] for record in records(target)) == sorted(begun)
    assert run_echo(job).num_ok == 480


def test_a_cancelled_run_gives_up_what_is_in_work(tmp_path: Path):
    target = tmp_path / "out.jsonl"
    job = make_job(write_requests(tmp_path / "in.jsonl", 50), target)
    counts, ended, all_wait = Counts(), [], asyncio.Event()

    async def answer(line: Line) -> Reply:
        if line.number <= 10:
            return await echo(line)
        if counts.num_in_work == 8 and counts.num_ok == 10:
            all_wait.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(line.number)
        raise AssertionError("it was to be cancelled")

    async def run() -> None:
        with open_job(job, check_inputs(job), overwrite=False) as opened:
            work = asyncio.create_task(pump_of(opened, answer, counts=counts).run())
            await all_wait.wait()
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work

    asyncio.run(run())
    assert len(ended) == 8
    assert counts.num_in_work == 0
    assert sorted(record["line"] for record in records(target)) == list(range(1, 11))


@pytest.mark.parametrize("where", ["handler", "input"])
def test_a_failure_ends_the_job(where: str, tmp_path: Path):
    source = write_requests(tmp_path / "in.jsonl", 500)
    if where == "input":
        import gzip

        cut = gzip.compress(source.read_bytes())[:-200]
        source = tmp_path / "in.jsonl.gz"
        source.write_bytes(cut)
    target = tmp_path / "out.jsonl"
    job = make_job(source, target)

    async def answer(line: Line) -> Reply:
        if where == "handler" and line.number == 100:
            raise EngineDeadError("it is gone")
        return await echo(line)

    words = {"handler": "it is gone", "input": "cannot be read on: .* Nothing is lost"}[where]
    with pytest.raises(JaxInferError, match=words):
        run_echo(job, answer)
    lines = [record["line"] for record in records(target)]
    assert len(lines) == len(set(lines)) > 0


def test_a_line_that_ends_the_engine_each_time_costs_itself_only(tmp_path: Path):
    target = tmp_path / "out.jsonl"
    job = make_job(write_requests(tmp_path / "in.jsonl", 60), target)
    engine = FragileEngine({7, 8, 30, 60})
    counts = run_echo(job, engine.answer)
    assert (counts.num_ok, counts.num_failed, counts.num_in_work) == (56, 4, 0)
    assert engine.num_losses <= 3 * len(engine.killers)
    assert engine.last_beside == dict.fromkeys(engine.killers, set()), "blamed when it was alone"
    failed = [record for record in records(target) if record["error"] is not None]
    assert {record["line"] for record in failed} == engine.killers
    for record in failed:
        assert record["response"]["status_code"] == record["error"]["code"] == 500
        words = f"in.jsonl:{record['line']}: the engine was lost each time it worked on this line"
        assert words in record["error"]["message"]
    assert run_echo(job, engine.answer).num_done == 0


def test_a_stop_begins_no_line_that_waits_for_suspects(tmp_path: Path):
    target = tmp_path / "out.jsonl"
    job = make_job(write_requests(tmp_path / "in.jsonl", 60), target)
    engine, stop, asked = FragileEngine({1}), asyncio.Event(), set[int]()

    async def answer(line: Line) -> Reply:
        if engine.num_losses == 3:  # the others of the first twelve are suspects yet
            stop.set()
        assert line.number in asked or not stop.is_set(), "it was not begun"
        asked.add(line.number)
        return await engine.answer(line)

    with open_job(job, check_inputs(job), overwrite=False) as opened:
        asyncio.run(pump_of(opened, answer, stop=stop, concurrency=12).run())
    assert stop.is_set()
    assert {record["line"] for record in records(target)} == asked == set(range(1, 13))


def test_an_engine_that_no_line_survives_ends_the_job(tmp_path: Path):
    target = tmp_path / "out.jsonl"
    job = make_job(write_requests(tmp_path / "in.jsonl", 60), target)
    engine = FragileEngine(set(range(1, 61)))
    with pytest.raises(EngineDeadError, match="9 lines in a row lost the engine, each of them"):
        run_echo(job, engine.answer)
    assert len(records(target)) == 8
    engine = FragileEngine(set(range(1, 61)))
    with (
        pytest.raises(EngineDeadError, match="lost 2 times without an answer between: status 503"),
        open_job(job, check_inputs(job), overwrite=False) as opened,
    ):
        asyncio.run(pump_of(opened, engine.answer, max_losses=1).run())
    with (
        pytest.raises(EngineDeadError, match=r"lost once, and may not .* Nothing is lost: start"),
        open_job(job, check_inputs(job), overwrite=False) as opened,
    ):
        asyncio.run(pump_of(opened, engine.answer, max_losses=0).run())
    assert len(records(target)) == 8


def test_work_that_is_lost_late_is_no_silence(tmp_path: Path):
    job = make_job(write_requests(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl")
    asked: Counter[int] = Counter()

    async def answer(line: Line) -> Reply:
        asked[line.number] += 1
        await asyncio.sleep(0.05)
        is_lost = asked[line.number] < 3
        return refused(503, retry_after_s=0.01, lost_engine=True) if is_lost else await echo(line)

    with open_job(job, check_inputs(job), overwrite=False) as opened:
        counts = Counts()
        asyncio.run(pump_of(opened, answer, counts=counts, give_up_after_s=0.04).run())
    assert counts.num_ok == 4


def test_lines_that_are_read_ahead_are_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pump, "_BYTES_AT_ONCE", 10_000)
    source, most_queued = tmp_path / "in.jsonl", 0
    source.write_text("".join(request_line(index, prompt="x" * 3000) for index in range(60)))

    async def answer(line: Line) -> Reply:
        nonlocal most_queued
        most_queued = max(most_queued, work._queue.qsize())
        await asyncio.sleep(0.001)
        return await echo(line)

    job, counts = make_job(source, tmp_path / "out.jsonl"), Counts()
    with open_job(job, check_inputs(job), overwrite=False) as opened:
        work = pump_of(opened, answer, counts=counts, concurrency=2)
        asyncio.run(work.run())
    assert counts.num_ok == 60
    assert 0 < most_queued <= 6  # of 60; two are marks of the end


def test_a_disk_that_does_not_take_the_answers_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pump, "_SYNC_EVERY_S", 0.01)
    counts = Counts()
    job = make_job(write_requests(tmp_path / "in.jsonl", 50), tmp_path / "out.jsonl")

    async def answer(line: Line) -> Reply:
        await asyncio.sleep(0.05)
        return await echo(line)

    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with (
        pytest.raises(JaxInferError, match=r"cannot be brought to the disk .*Input/output error"),
        open_job(job, check_inputs(job), overwrite=False) as opened,
    ):
        monkeypatch.setattr("jaxinfer.batch.journal.os.fsync", fsync)
        asyncio.run(pump_of(opened, answer, concurrency=2, counts=counts).run())
    assert counts.num_ok < 25, "at once, not when all is done"
