"""Runs a large job and prints the memory of this process (bytes) at every tenth of it, as JSON.

python -m tests.batch.big INPUT OUTPUT NUM_LINES
"""

import json
import sys
from pathlib import Path

import psutil

from jaxinfer.batch.lines import Line, Reply
from tests.batch.echo import echo, make_job, request_line, run_echo


def main(source: str, target: str, num_lines: int) -> None:
    with Path(source).open("w") as stream:
        for index in range(num_lines):
            stream.write(request_line(index))
    process, seen = psutil.Process(), []

    async def answer(line: Line) -> Reply:
        if line.number % (num_lines // 10) == 0:
            seen.append(process.memory_info().rss)
        return await echo(line)

    job = make_job(source, target)
    counts = run_echo(job, answer, concurrency=64)
    again = run_echo(job, answer, concurrency=64)
    seen.append(process.memory_info().rss)
    print(json.dumps({"done": counts.num_ok, "again": again.num_done, "memory": seen}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
