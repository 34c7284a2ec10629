"""The HTTP part of scripts/profile_host.py: a real server around a device that takes no time.

What HTTP costs a request is what the server spends on it, less what AsyncEngine alone spends on
the same prompt; both are measured in turn, in one process.
"""

import argparse
import asyncio
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web
from host_parts import tiny_config, write_tiny_model

from jaxinfer.config.schema import EngineConfig, ServerConfig
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.engine.client import ProcessClient
from jaxinfer.server.app import create_app, make_runner
from jaxinfer.tokenizer.tokenizer import load_tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog. "
_ROUNDS = 7


class Load(NamedTuple):
    """What the client does: `streams` connections, each sending `requests` one after the other."""

    path: str
    streams: int
    requests: int
    max_tokens: int
    stream: bool


def client_main(port: int, load: Load) -> None:
    """A process of its own, so that its time is not counted: sends, counts frames, prints JSON."""
    body: dict[str, Any] = {"max_tokens": load.max_tokens, "stream": load.stream, "temperature": 0}
    body["ignore_eos"] = True
    if load.path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": PROMPT}]
    else:
        body["prompt"] = PROMPT
    payload = json.dumps(body).encode()
    head = f"POST {load.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload
    end = b"0\r\n\r\n" if load.stream else b"}"
    walls: list[float] = []
    num_frames = 0

    async def one_stream() -> None:
        nonlocal num_frames
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(load.requests):
            start_s = time.perf_counter()
            writer.write(request)
            tail = data = b""
            while not tail.endswith(end) and (data := await reader.read(1 << 16)):
                num_frames += data.count(b"data: {")
                tail = (tail + data)[-64:]
            assert data, "the server closed the connection"
            walls.append(time.perf_counter() - start_s)
        writer.close()

    async def all_streams() -> None:
        await asyncio.gather(*(one_stream() for _ in range(load.streams)))

    asyncio.run(all_streams())
    print(json.dumps({"frames": num_frames, "median_s": statistics.median(walls)}))


async def _measure_load(port: int, load: Load) -> dict[str, float]:
    words = [str(port), *(str(int(x)) if isinstance(x, bool) else str(x) for x in load)]
    command = [sys.executable, __file__, *words]
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    cpu_s = time.process_time()  # spawning is over
    told = await child.stdout.read()
    cpu_s = time.process_time() - cpu_s
    assert await child.wait() == 0, "the client failed"
    return {"cpu_s": cpu_s, "requests": load.streams * load.requests, **json.loads(told)}


async def _measure_engine(engine: AsyncEngine, load: Load) -> float:
    """Processor seconds of a request of the load, asked of the engine without HTTP."""
    params = SamplingParams(max_tokens=load.max_tokens, temperature=0.0, ignore_eos=True)

    async def one_stream(stream: int) -> None:
        for number in range(load.requests):
            outputs = engine.generate(
                PROMPT, params, request_id=f"{stream}-{number}", output_kind="final"
            )
            async for _ in outputs:
                pass

    cpu_s = time.process_time()
    await asyncio.gather(*(one_stream(stream) for stream in range(load.streams)))
    return (time.process_time() - cpu_s) / (load.streams * load.requests)


async def _with_server(
    config: EngineConfig, directory: Path, factory: str, loads: list[Load]
) -> list[dict[str, float]]:
    """The results of the loads against a server in this process: medians, each beside what the
    engine alone spends on a request where the answer is not streamed."""
    client = ProcessClient(config, runner_factory=f"host_parts:{factory}", log_level="error")
    engine = AsyncEngine(client, load_tokenizer(directory), "tiny")
    await engine.start()
    runner = make_runner(create_app(engine, ServerConfig()))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        gc.collect()
        gc.freeze()
        return [await _measure(engine, port, load) for load in loads]
    finally:
        await runner.cleanup()
        await engine.close()


async def _measure(engine: AsyncEngine, port: int, load: Load) -> dict[str, float]:
    if load.stream:
        return await _measure_load(port, load)
    rounds = []
    for _ in range(_ROUNDS):
        engine_s = await _measure_engine(engine, load)
        result = await _measure_load(port, load)
        request_s = result["cpu_s"] / result["requests"]
        times = {"request_s": request_s, "engine_s": engine_s, "http_s": request_s - engine_s}
        rounds.append({**result, **times})
    return {name: statistics.median(result[name] for result in rounds) for name in rounds[0]}


def profile_http(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    write_tiny_model(directory, num_layers=1)
    config = tiny_config(directory, args.num_seqs)
    result: dict[str, Any] = {}
    num_tokens = args.num_steps
    print("processor time of the server's process; latency as the client sees it")
    logging.getLogger("jaxinfer").setLevel(logging.ERROR)
    for path in ("/v1/completions", "/v1/chat/completions"):
        warm_up = Load(path, 1, 20, 1, stream=False)
        one = Load(path, 1, 150, 1, stream=False)
        many = Load(path, 16, 30, 1, stream=False)
        instant = [warm_up, one, many, one._replace(requests=300, stream=True)]
        _, alone, together, streamed = asyncio.run(
            _with_server(config, directory, "build_instant", instant)
        )
        long = Load(path, args.num_seqs, 1, num_tokens, stream=True)
        _, paced = asyncio.run(_with_server(config, directory, "build_paced", [warm_up, long]))
        per_request_s = streamed["cpu_s"] / streamed["requests"]
        tokens = args.num_seqs * num_tokens
        row = {
            "request_cpu_us": alone["request_s"] * 1e6,
            "of_which_http_us": alone["http_s"] * 1e6,
            "request_cpu_us_at_16": together["request_s"] * 1e6,
            "of_which_http_us_at_16": together["http_s"] * 1e6,
            "request_latency_us": alone["median_s"] * 1e6,
            "streamed_request_cpu_us": per_request_s * 1e6,
            "token_cpu_us": (paced["cpu_s"] - args.num_seqs * per_request_s) / tokens * 1e6,
            "frames_per_token": paced["frames"] / tokens,
        }
        result[path] = {name: round(value, 2) for name, value in row.items()}
        print(path)
        for name, value in result[path].items():
            print(f"  {name:<26}{value:>10.1f}")
    return result


def client() -> None:
    """`profile_http.py PORT PATH STREAMS REQUESTS MAX_TOKENS STREAM`"""
    port, path, *numbers = sys.argv[1:]
    streams, requests, max_tokens, stream = map(int, numbers)
    client_main(int(port), Load(path, streams, requests, max_tokens, bool(stream)))


if __name__ == "__main__":
    client()
