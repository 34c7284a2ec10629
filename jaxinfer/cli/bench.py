"""`jaxinfer bench`: finds the benchmark and hands it its words. Knows their names only."""

import importlib
from collections.abc import Sequence

from jaxinfer.config.fields import nearest
from jaxinfer.errors import ConfigError

BENCHMARKS = {
    "throughput": "offline: tokens per second of many prompts at once",
    "latency": "offline: times of one batch after the other",
    "serve": "a server under load: ours, or any with OpenAI's API",
}
"""Name -> what it measures; `jaxinfer.cli.bench_NAME` runs it."""


def _help() -> str:
    lines = [f"  {name:<10}  {what}" for name, what in BENCHMARKS.items()]
    return "\n".join(["usage: jaxinfer bench BENCHMARK [...]", "", "benchmarks:", *lines])


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark that the first word names."""
    given = argv[0] if argv else ""
    if given in BENCHMARKS:
        return importlib.import_module(f"jaxinfer.cli.bench_{given}").run(argv[1:])
    if given in ("-h", "--help"):
        print(_help())
        return 0
    near = nearest(given, BENCHMARKS)
    hint = f" Did you mean {near}?" if near else ""
    what = f"Unknown benchmark {given!r}.{hint}" if given else "No benchmark is named."
    raise ConfigError(f"{what} There are: {', '.join(BENCHMARKS)}.")
