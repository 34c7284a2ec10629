"""Ours against a peer on the same workloads, in one sitting, alternating.

    scripts/compare_peers --peer vllm --peer-python VENV/bin/python --model DIR
    scripts/compare_peers --peer vllm --peer-python VENV/bin/python --model DIR --serve

Both engines are loaded once (with --restart before each alternation) and take turns, workload by
workload; who comes first changes with each alternation. The one whose turn it is not is held still
by SIGSTOP, so it takes no processor time whatever it does when idle. Each alternation gives a ratio
of two neighbouring runs; their median and range count, because machines drift. Prints a table in
Markdown for docs/benchlog.md; --json writes every run.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import process_tree
from peer_driver import MAX_MODEL_LEN, MAX_NUM_SEQS, vllm_environment

from jaxinfer.bench.client import ENDPOINTS, Target
from jaxinfer.bench.load import LoadShape
from jaxinfer.bench.prompts import PromptSource
from jaxinfer.bench.serve import ServeSettings, find_model, measure_level
from jaxinfer.bench.server_process import JaxInferServer, ServerProcess, free_port
from jaxinfer.bench.workloads import PEERS, Workload
from jaxinfer.config.fields import build
from jaxinfer.config.schema import ServeConfig

SIDES = ("ours", "peer")
DRIVER = Path(__file__).with_name("peer_driver.py")


@dataclass(kw_only=True)
class Side:
    """One engine in its process, and what was seen of it from outside."""

    name: str
    pid: int
    run: Callable[..., dict[str, float]]  # one measurement; its arguments are the mode's
    startup_s: float
    facts: dict[str, Any] = field(default_factory=dict)


class Turn(NamedTuple):
    """One run of one side."""

    alternation: int
    case: str
    side: str
    figures: dict[str, float]


# ------------------------------------------------------------------------- offline


@contextmanager
def offline_side(name: str, command: Sequence[str]) -> Iterator[Side]:
    """An engine behind scripts/peer_driver.py."""
    start_s = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def answer() -> dict[str, Any]:
        line = answers.readline()
        if not line:
            raise SystemExit(f"{name} ended with status {process.wait()}: its output is above")
        return json.loads(line)

    def run(workload: Workload, seed: int) -> dict[str, float]:
        cpu_s = process_tree.cpu_s(process.pid)
        print(json.dumps({**workload._asdict(), "seed": seed}), file=requests, flush=True)
        wall_s = answer()["wall_s"]
        num_output = workload.num_prompts * workload.output_len
        num_all = num_output + workload.num_prompts * workload.input_len
        return {
            "wall_s": wall_s,
            "cpu_s": process_tree.cpu_s(process.pid) - cpu_s,
            "output_tok_s": num_output / wall_s,
            "all_tok_s": num_all / wall_s,
        }

    try:
        ready = answer()["ready"]
        startup_s = time.perf_counter() - start_s
        yield Side(name=name, pid=process.pid, run=run, startup_s=startup_s, facts=ready)
    finally:
        process_tree.resume(process.pid)
        tree = process_tree.members(process.pid)
        requests.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        for left in tree[1:]:
            if left.is_running():
                left.kill()
        process.wait()


def driver_command(name: str, args: argparse.Namespace) -> list[str]:
    """The driver under the side's own Python."""
    if name == "ours":
        python, engine = sys.executable, "jaxinfer"
        model, dtype, options = args.model, args.dtype, args.options
    else:
        python, engine = args.peer_python, args.peer
        model, dtype, options = args.peer_model, args.peer_dtype, args.peer_options
    words = ["--engine", engine, "--model", model, "--dtype", dtype, "--options", options]
    return [python, str(DRIVER), *words, "--vocab-size", str(args.vocab_size)]


# -------------------------------------------------------------------------- serving


@contextmanager
def server_side(name: str, server: ServerProcess, args: argparse.Namespace) -> Iterator[Side]:
    """A server, measured by the client of `jaxinfer bench serve`."""
    with server:
        target = Target(base_url=server.base_url, endpoint=args.endpoint, model="", ignore_eos=True)
        target = find_model(target)

        def run(concurrency: int, seed: int) -> dict[str, float]:
            cpu_s = process_tree.cpu_s(server.pid)
            report = measure_level(target, serve_settings(args, concurrency, seed), 0).report
            if report.errors:
                raise SystemExit(f"{name}, concurrency {concurrency}: {report.errors}")
            assert report.ttft_s is not None
            assert report.itl_s is not None
            return {
                "ttft_p50_ms": report.ttft_s.p50 * 1e3,
                "ttft_p99_ms": report.ttft_s.p99 * 1e3,
                "itl_p50_ms": report.itl_s.p50 * 1e3,
                "itl_p99_ms": report.itl_s.p99 * 1e3,
                "output_tok_s": report.output_tok_s,
                "cpu_s": process_tree.cpu_s(server.pid) - cpu_s,
                "tokens_per_frame": report.tokens_per_frame,
                "client_cpu_share": report.client_cpu_share,
            }

        try:
            yield Side(name=name, pid=server.pid, run=run, startup_s=server.startup_s)
        finally:
            process_tree.resume(server.pid)


def serve_settings(args: argparse.Namespace, concurrency: int, seed: int) -> ServeSettings:
    return ServeSettings(
        source=PromptSource(
            dataset="random",
            path=None,
            input_len=args.input_len,
            output_len=args.output_len,
            vocab_size=args.vocab_size,
            seed=seed,
        ),
        shape=LoadShape(seed=seed),
        num_prompts=max(args.min_prompts, args.rounds * concurrency),
        num_warmups=concurrency,
        concurrencies=(concurrency,),
    )


def vllm_server(args: argparse.Namespace) -> ServerProcess:
    """vLLM's OpenAI server: by its module, for the `vllm` command cannot find its own version."""
    port = free_port()
    flags = {
        "--model": args.peer_model,
        "--dtype": args.peer_dtype,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--max-model-len": str(MAX_MODEL_LEN),
        "--max-num-seqs": str(MAX_NUM_SEQS),
    }
    words = [word for pair in flags.items() for word in pair]
    return ServerProcess(
        [args.peer_python, "-m", "vllm.entrypoints.openai.api_server", *words],
        base_url=f"http://127.0.0.1:{port}",
        ready_path="/health",
        env={**vllm_environment(), **os.environ, "HF_HUB_OFFLINE": "1"},
        timeout_s=args.start_timeout,
    )


def our_server(args: argparse.Namespace) -> ServerProcess:
    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS}
    settings = {"model": args.model, "dtype": args.dtype, **limits, **json.loads(args.options)}
    return JaxInferServer(build(ServeConfig, {**settings, "disable_log_requests": True}))


# ----------------------------------------------------------------------- alternating


@contextmanager
def both_sides(args: argparse.Namespace) -> Iterator[tuple[Side, Side]]:
    """Both loaded, one after the other; held still from then on."""
    with ExitStack() as stack:
        sides = []
        for name in SIDES:
            print(f"starting {name} ...", file=sys.stderr)
            side = stack.enter_context(open_side(name, args))
            watch = process_tree.MemoryWatch(side.pid)
            stack.callback(watch.close)
            side.facts["idle_cpu_share"] = process_tree.idle_cpu_share(side.pid)
            side.facts["watch"] = watch
            process_tree.pause(side.pid)
            sides.append(side)
        yield sides[0], sides[1]


def open_side(name: str, args: argparse.Namespace) -> Any:
    if args.serve:
        server = our_server(args) if name == "ours" else vllm_server(args)
        return server_side(name, server, args)
    return offline_side(name, driver_command(name, args))


def take_turns(sides: Sequence[Side], cases: dict[str, Any], alternation: int) -> Iterator[Turn]:
    """One alternation: each case on both sides, one straight after the other."""
    order = sides if alternation % 2 == 0 else sides[::-1]
    for number, (case, what) in enumerate(cases.items()):
        # Both sides get the same prompts, and no case those of another: engines differ in how much
        # of a prompt their prefix caches find again (pages of 16 tokens here, 128 there).
        seed = alternation * len(cases) + number
        for side in order:
            process_tree.resume(side.pid)
            figures = side.run(what, seed)
            process_tree.pause(side.pid)
            rate = figures["output_tok_s"]
            print(f"  {alternation}  {case:<12} {side.name}: {rate:.1f} tok/s", file=sys.stderr)
            yield Turn(alternation, case, side.name, figures)


def measure(args: argparse.Namespace, cases: dict[str, Any]) -> tuple[list[Turn], dict[str, Any]]:
    """All turns, and what was seen of each side."""
    turns: list[Turn] = []
    seen: dict[str, Any] = {
        name: {"startup_s": [], "memory_bytes": 0, "peak_rss_bytes": 0} for name in SIDES
    }
    rounds = range(args.alternations)
    for group in [[number] for number in rounds] if args.restart else [list(rounds)]:
        with both_sides(args) as sides:
            for alternation in group:
                turns += take_turns(sides, cases, alternation)
            for side in sides:
                watch = side.facts.pop("watch")
                watch.close()
                entry = seen[side.name]
                entry["startup_s"].append(side.startup_s)
                entry["memory_bytes"] = max(entry["memory_bytes"], watch.peak_bytes)
                peak_rss_bytes = process_tree.peak_rss_bytes(side.pid)
                entry["peak_rss_bytes"] = max(entry["peak_rss_bytes"], peak_rss_bytes)
                entry |= side.facts
    return turns, seen


# ---------------------------------------------------------------------------- report


def values(turns: Sequence[Turn], case: str, side: str, figure: str) -> list[float]:
    """In the order of the alternations, which is that of the turns."""
    return [turn.figures[figure] for turn in turns if (turn.case, turn.side) == (case, side)]


def ratios(turns: Sequence[Turn], case: str, figure: str) -> list[float]:
    """Ours over the peer's, one for each alternation."""
    ours, peers = (values(turns, case, side, figure) for side in SIDES)
    return [our / peer for our, peer in zip(ours, peers, strict=True)]


def spread(numbers: Sequence[float]) -> str:
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}..{max(numbers):.2f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {line} |" for line in (" | ".join(row) for row in rows)]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def offline_table(turns: Sequence[Turn], cases: dict[str, Any]) -> str:
    rows = [["workload", "ours tok/s", "peer tok/s", "ratio (range)", "CPU-s ours : peer"]]
    for case, workload in cases.items():
        # Of a single token, the rate of the prompt is what there is to compare.
        figure = "output_tok_s" if workload.output_len > 1 else "all_tok_s"
        ours, peer = (statistics.median(values(turns, case, side, figure)) for side in SIDES)
        cpu = [statistics.median(values(turns, case, side, "cpu_s")) for side in SIDES]
        cells = [case, f"{ours:.1f}", f"{peer:.1f}", spread(ratios(turns, case, figure))]
        rows.append([*cells, f"{cpu[0]:.1f} : {cpu[1]:.1f}"])
    return markdown(rows)


def serve_table(turns: Sequence[Turn], cases: dict[str, Any]) -> str:
    figures = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "output_tok_s")
    rows = [["streams", "figure", "ours", "peer", "ours / peer (range)"]]
    for case in cases:
        for figure in figures:
            ours, peer = (statistics.median(values(turns, case, side, figure)) for side in SIDES)
            cells = [case, figure, f"{ours:.1f}", f"{peer:.1f}"]
            rows.append([*cells, spread(ratios(turns, case, figure))])
    return markdown(rows)


def sides_table(seen: dict[str, Any]) -> str:
    rows = [["side", "dtype", "start-up s", "memory MB", "peak RSS MB", "idle CPU of a core"]]
    for name in SIDES:
        entry = seen[name]
        startup = "/".join(f"{seconds:.1f}" for seconds in entry["startup_s"])
        memory = f"{entry['memory_bytes'] / 1e6:.0f}"
        peak = f"{entry['peak_rss_bytes'] / 1e6:.0f}"
        idle = f"{entry['idle_cpu_share']:.1%}"
        rows.append([name, entry.get("dtype", "-"), startup, memory, peak, idle])
    return markdown(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=["vllm", "transformers", "llamacpp"], required=True)
    parser.add_argument("--peer-python", required=True, help="the Python that has the peer")
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--peer-model", help="another path for the peer (llamacpp: a .gguf file)")
    parser.add_argument("--dtype", default="auto", help="ours")
    parser.add_argument("--peer-dtype", default="auto")
    parser.add_argument("--options", default="{}", help="JSON: more settings of ours")
    parser.add_argument("--peer-options", default="{}", help="JSON: more arguments of the peer")
    parser.add_argument("--alternations", type=int, default=3)
    parser.add_argument("--restart", action="store_true", help="start both for each alternation")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of workloads, from 0")
    parser.add_argument("--vocab-size", type=int, default=49_000, help="token ids are below it")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--start-timeout", type=float, default=1800.0, help="of a server, s")
    serving = parser.add_argument_group("serving")
    serving.add_argument("--serve", action="store_true", help="servers under load (peer: vllm)")
    serving.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    serving.add_argument("--endpoint", choices=ENDPOINTS, default=ENDPOINTS[0])
    serving.add_argument("--input-len", type=int, default=128)
    serving.add_argument("--output-len", type=int, default=64)
    serving.add_argument("--rounds", type=int, default=2, help="requests of each stream")
    serving.add_argument("--min-prompts", type=int, default=8)
    args = parser.parse_args()
    if args.serve and args.peer != "vllm":
        parser.error("--serve compares with vllm only")
    if args.only is not None and not all(0 <= number < len(PEERS) for number in args.only):
        parser.error(f"--only must be between 0 and {len(PEERS) - 1}")
    if args.alternations < 1:
        parser.error("--alternations must be at least 1")
    args.peer_model = args.peer_model or args.model
    return args


def end_in_order(number: int, _frame: object) -> NoReturn:
    """By SIGTERM too, no process may be left behind that is held still for ever."""
    raise SystemExit(128 + number)


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, end_in_order)
    if args.serve:
        cases: dict[str, Any] = {str(number): number for number in args.concurrency}
    else:
        chosen = range(len(PEERS)) if args.only is None else args.only
        cases = {f"{w[0]}x{w[1]}/{w[2]}": w for w in (PEERS[number] for number in chosen)}
    turns, seen = measure(args, cases)
    table = serve_table if args.serve else offline_table
    print(f"ours against {args.peer}, {args.alternations} alternations, {platform.machine()}\n")
    print(table(turns, cases))
    print()
    print(sides_table(seen))
    if args.json is not None:
        result = {"args": vars(args), "sides": seen, "turns": [turn._asdict() for turn in turns]}
        Path(args.json).write_bytes(msgspec.json.encode(result) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
