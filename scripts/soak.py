#!/usr/bin/env python3
"""Leaves a server under mixed load for a while and says whether anything grew, broke or stuck.

    .venv/bin/python scripts/soak.py [--minutes 20] [MODEL] [-- serve flags ...]
    .venv/bin/python scripts/soak.py --url http://127.0.0.1:8000 --pid PID

Starts `jaxinfer serve` on a free port (or takes one that runs), then sends, in random order: whole
answers, streams, streams left in the middle, bad requests, readers that dawdle or stop reading, and
halves of requests. Greedy answers must equal what the idle server said at the start. With
`--kill-core-every S` the engine core is killed every S seconds, and 503 is an answer meanwhile.

Every few seconds it samples the memory of both processes and the KV pages in use. At the end it
prints counts, slopes in MiB/h (least squares, after the first fifth, with standard errors) and a
verdict; the exit code is 1 when an answer was wrong, an error unexpected, a page not given back, or
memory grows by more than --max-slope beyond two standard errors. Needs psutil (the test extra).
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import psutil

MIB = 2**20
MIN_SPAN_S = 60.0  # a new process grows while it warms up
ROUTE = "/v1/completions"
PROMPTS = [
    f"{start} {n}, {n + 1}, {n + 2},"
    for start in ("Count:", "The numbers are", "Once there were")
    for n in range(1, 9)
]
BAD_BODIES: list[Any] = [
    {"prompt": "x", "temperature": -1},
    {"prompt": "x", "max_tokens": "many"},
    {"prompt": ""},
    {"prompt": "x", "model": "no such model"},
    ["not an object"],
]
WEIGHTS = {"whole": 6, "stream": 6, "leave": 4, "bad": 3, "dawdle": 2, "deaf": 1, "half": 1}


class Sample(NamedTuple):
    time_s: float
    server_rss: int
    core_rss: int
    core_pid: int
    kv_usage: float


class Slope(NamedTuple):
    """MiB per hour."""

    value: float
    error: float
    num_samples: int


@dataclass(kw_only=True)
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_kills: int = 0

    def blame(self, problem: str) -> None:
        self.counts["PROBLEMS"] += 1
        if len(self.problems) < 20:
            self.problems.append(problem)


def slope(times_s: list[float], sizes: list[int]) -> Slope | None:
    """Ordinary least squares after the first fifth; None for samples of less than a minute."""
    if not times_s or times_s[-1] - times_s[0] < MIN_SPAN_S or len(times_s) < 5:
        return None
    hours = np.array(times_s[len(times_s) // 5 :]) / 3600
    mibs = np.array(sizes[len(sizes) // 5 :]) / MIB
    centred = hours - hours.mean()
    value = float((centred * mibs).sum() / (centred**2).sum())
    residuals = mibs - mibs.mean() - value * centred
    error = float(np.sqrt((residuals**2).sum() / (len(hours) - 2) / (centred**2).sum()))
    return Slope(value, error, len(hours))


class Soak:
    """The load on one server, and what came of it."""

    def __init__(self, url: str, pid: int, args: argparse.Namespace) -> None:
        self.url = url
        self.tally = Tally()
        self.samples: list[Sample] = []
        self._server = psutil.Process(pid)
        self._args = args
        self._random = random.Random(args.seed)
        self._expected: dict[int, str] = {}
        self._is_over = asyncio.Event()
        self._may_fail_until_s = 0.0

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self._http:
            for index in range(len(PROMPTS)):
                async with self._http.post(self.url + ROUTE, json=self._body(index)) as response:
                    response.raise_for_status()
                    self._expected[index] = (await response.json())["choices"][0]["text"]
            jobs = [self._work() for _ in range(self._args.concurrency)]
            jobs += [self._sample()]
            if self._args.kill_core_every:
                jobs.append(self._kill())
            running = asyncio.gather(*jobs)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(running), self._args.minutes * 60)
            self._is_over.set()
            await running
            await self._until_quiet()

    def _body(self, index: int, **more: Any) -> dict[str, Any]:
        settings = {"max_tokens": 16 + index % 48, "temperature": 0, "ignore_eos": True}
        return {"prompt": PROMPTS[index], **settings, **more}

    async def _work(self) -> None:
        acts: dict[str, Callable[[int], Awaitable[str]]] = {
            "whole": self._whole,
            "stream": self._stream,
            "leave": self._leave,
            "bad": self._bad,
            "dawdle": self._dawdle,
            "deaf": self._deaf,
            "half": self._half,
        }
        while not self._is_over.is_set():
            [kind] = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            index = self._random.randrange(len(PROMPTS))
            try:
                outcome = await acts[kind](index)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                outcome = type(error).__name__
            self.tally.counts[f"{kind}: {outcome}"] += 1
            if outcome not in ("ok", "left"):
                if outcome == "503" and time.monotonic() < self._may_fail_until_s:
                    await asyncio.sleep(0.5)
                else:
                    self.tally.blame(f"{kind} of prompt {index}: {outcome}")

    def _judge(self, index: int, text: str) -> str:
        return "ok" if text == self._expected[index] else f"wrong text {text[:60]!r}"

    async def _whole(self, index: int) -> str:
        async with self._http.post(self.url + ROUTE, json=self._body(index)) as response:
            body = await response.json()
            if response.status != 200:
                return str(response.status)
            return self._judge(index, body["choices"][0]["text"])

    async def _read(self, index: int, *, leave_after: int | None = None, pause_s: float = 0) -> str:
        text, num_frames = "", 0
        body = self._body(index, stream=True)
        async with self._http.post(self.url + ROUTE, json=body) as response:
            if response.status != 200:
                return str(response.status)
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                frame = json.loads(line.removeprefix(b"data: "))
                if "error" in frame:
                    return str(frame["error"]["code"])
                text += frame["choices"][0]["text"]
                num_frames += 1
                if num_frames == leave_after:
                    response.close()
                    return "left"
                await asyncio.sleep(pause_s)
        return self._judge(index, text)

    async def _stream(self, index: int) -> str:
        return await self._read(index)

    async def _leave(self, index: int) -> str:
        outcome = await self._read(index, leave_after=self._random.randrange(1, 8))
        return "left" if outcome == "ok" else outcome  # it was shorter than that

    async def _dawdle(self, index: int) -> str:
        return await self._read(index, pause_s=0.1)

    async def _bad(self, index: int) -> str:
        body = BAD_BODIES[index % len(BAD_BODIES)]
        async with self._http.post(self.url + ROUTE, json=body) as response:
            await response.read()
            return "ok" if response.status in (400, 404) else str(response.status)

    async def _raw(self, data: bytes) -> str:
        """Sends bytes, reads nothing for a while, goes away."""
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(data)
        await asyncio.sleep(self._random.uniform(0.1, 3.0))
        writer.transport.abort()
        return "left"

    async def _deaf(self, index: int) -> str:
        body = json.dumps(self._body(index, stream=True, n=4, logprobs=5)).encode()
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: soak\r\nContent-Length: {len(body)}\r\n\r\n"
        return await self._raw(head.encode() + body)

    async def _half(self, index: int) -> str:
        body = json.dumps(self._body(index)).encode()
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: soak\r\nContent-Length: {len(body)}\r\n\r\n"
        data = head.encode() + body
        return await self._raw(data[: self._random.randrange(len(data))])

    async def _metric(self, name: str) -> float:
        async with self._http.get(f"{self.url}/metrics") as response:
            found = re.search(rf"^\w+:{name}{{.*}} (\S+)$", await response.text(), re.MULTILINE)
        return float(found[1]) if found else float("nan")

    async def _sample(self) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(psutil.NoSuchProcess, ValueError, aiohttp.ClientError):
                [core] = self._server.children()
                self.samples.append(
                    Sample(
                        time.monotonic(),
                        self._server.memory_info().rss,
                        core.memory_info().rss,
                        core.pid,
                        await self._metric("kv_cache_usage_perc"),
                    )
                )
            await self._sleep(self._args.sample_every)

    async def _kill(self) -> None:
        while not self._is_over.is_set():
            await self._sleep(self._args.kill_core_every)
            if self._is_over.is_set() or await self._status("/ready") != 200:
                continue
            self._may_fail_until_s = float("inf")
            for core in self._server.children():
                core.kill()
            self.tally.num_kills += 1
            await self._until(lambda: self._has_status("/ready", 503), "a killed core is not told")
            await self._until(lambda: self._has_status("/ready", 200), "the core is not back")
            self._may_fail_until_s = time.monotonic() + 5.0

    async def _status(self, path: str) -> int:
        async with self._http.get(self.url + path) as response:
            return response.status

    async def _has_status(self, path: str, status: int) -> bool:
        return await self._status(path) == status

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_over.wait(), seconds)

    async def _until(self, is_so: Callable[[], Awaitable[bool]], problem: str) -> None:
        deadline_s = time.monotonic() + 300
        while not await is_so():
            if time.monotonic() > deadline_s:
                self.tally.blame(problem)
                return
            await asyncio.sleep(0.1)

    async def _until_quiet(self) -> None:
        """Everything was given back."""

        async def is_quiet() -> bool:
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            return not any([await self._metric(name) for name in names])

        await self._until(is_quiet, "requests or pages were not given back")


@dataclass(frozen=True, kw_only=True)
class Report:
    minutes: float
    counts: dict[str, int]
    num_kills: int
    slopes: dict[str, Slope | None]
    rss_mib: dict[str, list[int]]  # first, last, most
    problems: list[str]
    passed: bool


def report(soak: Soak, args: argparse.Namespace) -> Report:
    """The core's slope is that of its last process."""
    samples = soak.samples
    last_pid = samples[-1].core_pid if samples else 0
    core = [sample for sample in samples if sample.core_pid == last_pid]
    slopes = {
        "server": slope([s.time_s for s in samples], [s.server_rss for s in samples]),
        "core": slope([s.time_s for s in core], [s.core_rss for s in core]),
    }
    grows = [s for s in slopes.values() if s and s.value - 2 * s.error > args.max_slope]
    sizes = {
        "server": [s.server_rss // MIB for s in soak.samples],
        "core": [s.core_rss // MIB for s in soak.samples],
    }
    return Report(
        minutes=args.minutes,
        counts=dict(sorted(soak.tally.counts.items())),
        num_kills=soak.tally.num_kills,
        slopes=slopes,
        rss_mib={name: [all_[0], all_[-1], max(all_)] for name, all_ in sizes.items() if all_},
        problems=soak.tally.problems,
        passed=not grows and not soak.tally.problems and bool(soak.samples),
    )


def show(result: Report) -> None:
    for name, count in result.counts.items():
        print(f"{count:8}  {name}")
    for name, one in result.slopes.items():
        first, last, most = result.rss_mib.get(name, [0, 0, 0])
        shown = "of too short a run"
        if one is not None:
            shown = f"{one.value:+.1f} +- {one.error:.1f} MiB/h"
        print(f"{name:>8}  RSS {first} -> {last} MiB (most {most}), slope {shown}")
    print(f"{result.num_kills:8}  kills of the core")
    for problem in result.problems:
        print(f"PROBLEM   {problem}")
    print("passed" if result.passed else "FAILED")


@contextlib.asynccontextmanager
async def server(args: argparse.Namespace) -> AsyncIterator[tuple[str, int]]:
    """(URL, pid) of the server that was named, or of one that is ended afterwards."""
    if args.url:
        yield args.url, args.pid
        return
    model = [args.model] if args.model else []
    command = [sys.executable, "-m", "jaxinfer.cli.main", "serve", *model, "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--disable-log-requests", "--engine-max-restarts", "1000"),
        *args.flags,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        url = None
        async for raw in process.stderr:
            if found := re.search(r"ready: (http://\S+?)/v1", raw.decode()):
                url = found[1]
                break
            sys.stderr.write(raw.decode())
        if url is None:
            raise SystemExit("the server did not start")
        log = asyncio.create_task(_copy(process.stderr, args.log))
        yield url, process.pid
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 60)
        await log
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _copy(lines: asyncio.StreamReader, path: Path | None) -> None:
    with open(path or "/dev/null", "wb") as file:  # noqa: ASYNC230 - a line now and then
        async for line in lines:
            file.write(line)


async def main(args: argparse.Namespace) -> int:
    async with server(args) as (url, pid):
        soak = Soak(url, pid, args)
        await soak.run()
    result = report(soak, args)
    show(result)
    if args.json:
        data = asdict(result)
        data["slopes"] = {k: v and v._asdict() for k, v in result.slopes.items()}
        args.json.write_text(json.dumps(data, indent=2))
    return 0 if result.passed else 1


def parse() -> argparse.Namespace:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="what to serve (default: the default model)")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="its process id")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--kill-core-every", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--sample-every", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--max-slope", type=float, default=40.0, metavar="MIB_PER_HOUR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the result goes, too")
    parser.add_argument("--log", type=Path, help="where the server's log goes")
    args = parser.parse_args(sys.argv[1:at])
    args.flags = sys.argv[at + 1 :]
    if bool(args.url) != bool(args.pid):
        parser.error("--url and --pid go together")
    return args


if __name__ == "__main__":
    sys.exit(asyncio.run(main(parse())))
