"""Jobs without an engine: files to read, and a handler that answers at once."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from jaxinfer.batch.job import OpenJob, check_inputs, open_job
from jaxinfer.batch.lines import Handler, Line, Reply
from jaxinfer.batch.pump import Counts, Pump
from jaxinfer.config.job import BatchConfig, InputsConfig, JobConfig, OutputsConfig, checked_job


def request_line(index: int, **body: Any) -> str:
    """A line as OpenAI's batches have it."""
    body = {"prompt": f"say {index}", **body}
    line = {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(line) + "\n"


def write_requests(path: Path, count: int) -> Path:
    path.write_text("".join(request_line(index) for index in range(count)))
    return path


def make_job(
    source: Path | str, target: Path | str, *, rows_per_file: int = 0, **inputs: Any
) -> JobConfig:
    is_parquet = rows_per_file > 0
    return checked_job(
        JobConfig(
            batch=BatchConfig(),
            inputs=InputsConfig(path=[str(source)], **inputs),
            outputs=OutputsConfig(
                path=str(target),
                format="parquet" if is_parquet else "auto",
                rows_per_file=rows_per_file or 1,
            ),
            sampling={},
        )
    )


def completion(text: str) -> dict[str, Any]:
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    return {"object": "text_completion", "choices": [choice], "usage": usage}


async def echo(line: Line) -> Reply:
    """The prompt, said back; at once."""
    return Reply(status=200, body=completion(line.body["prompt"]), request_id=str(line.number))


def pump_of(
    opened: OpenJob,
    handler: Callable[[Line], Awaitable[Reply]],
    *,
    concurrency: int = 8,
    counts: Counts | None = None,
    stop: asyncio.Event | None = None,
    give_up_after_s: float = 5.0,
    max_losses: int = 3,
) -> Pump:
    return Pump(
        opened.lines,
        handler,
        opened.sink,
        concurrency=concurrency,
        counts=counts or Counts(),
        stop=stop or asyncio.Event(),
        give_up_after_s=give_up_after_s,
        max_losses=max_losses,
    )


def run_echo(job: JobConfig, handler: Handler = echo, *, concurrency: int = 8) -> Counts:
    """Runs a job to its end in this process."""
    counts = Counts()
    with open_job(job, check_inputs(job), overwrite=False) as opened:
        if not opened.is_finished:
            asyncio.run(pump_of(opened, handler, concurrency=concurrency, counts=counts).run())
        opened.sink.finish()
    return counts
