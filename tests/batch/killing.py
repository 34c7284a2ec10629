"""Runs a job again and again, killing it at random moments, then once to the end.

python -m tests.batch.killing INPUT OUTPUT ROWS_PER_FILE NUM_KILLS SEED

Each run is a process of its own (forked, so that it need not import everything again) that tells
of each answer it has; after some answers and a moment it gets SIGKILL. A kill in the middle of a
write leaves a part of a line; that moment is too short to be met by chance, so after every second
kill the last line is cut at random, which leaves the same. Prints a line of JSON: how many runs
were killed, after how many of them a line was cut, how many lines were left to the last run.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet  # noqa: F401 - once, before the forks

from jaxinfer.batch.lines import Handler, Line, Reply
from jaxinfer.config.job import JobConfig
from tests.batch.echo import completion, make_job, run_echo

CONCURRENCY = 8


def telling(fd: int, seed: int) -> Handler:
    """Answers after a moment, out of order, and writes a byte to `fd` for each answer."""
    chance = random.Random(seed)

    async def answer(line: Line) -> Reply:
        await asyncio.sleep(chance.random() * 0.003)
        padding = "x" * (50_000 if line.number % 10 == 0 else 10)
        text = f"{line.body['prompt']} {padding}"
        os.write(fd, b".")
        return Reply(status=200, body=completion(text), request_id=str(line.number))

    return answer


def killed_run(job: JobConfig, *, num_answers: int, moment_s: float, seed: int) -> int:
    """The status of a run that is killed a moment after so many answers."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        run_echo(job, telling(writer, seed), concurrency=CONCURRENCY)
        os._exit(0)
    os.close(writer)
    for _ in range(num_answers):
        os.read(reader, 1)
    time.sleep(moment_s)
    os.kill(pid, signal.SIGKILL)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tear(target: Path, chance: random.Random) -> bool:
    """Cuts the last line of the journal; False when there is none."""
    records = target.with_name(target.name + ".jsonl") if target.suffix == ".txt" else target
    journals = [records] if records.is_file() else sorted(target.glob("_segment-*"))
    if not journals:
        return False
    content = journals[-1].read_bytes()
    if not content.endswith(b"\n"):
        return False
    start = content.rfind(b"\n", 0, -1) + 1
    os.truncate(journals[-1], chance.randrange(start + 1, len(content)))
    return True


def main(source: str, target: str, rows_per_file: str, num_kills: str, seed: str) -> None:
    job = make_job(source, target, rows_per_file=int(rows_per_file))
    chance = random.Random(int(seed))
    num_killed = num_torn = 0
    for number in range(int(num_kills)):
        status = killed_run(
            job,
            num_answers=chance.randint(0, 60),
            moment_s=chance.random() * 0.004,
            seed=number,
        )
        num_killed += status == -signal.SIGKILL
        num_torn += number % 2 == 1 and tear(Path(target), chance)
    counts = run_echo(job, telling(os.open(os.devnull, os.O_WRONLY), 0), concurrency=CONCURRENCY)
    print(json.dumps({"killed": num_killed, "torn": num_torn, "left": counts.num_done}))


if __name__ == "__main__":
    main(*sys.argv[1:])
