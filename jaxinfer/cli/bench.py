"""`jaxinfer bench throughput`: tokens per second of the offline engine on random prompts.

The prompts are those that the comparison with other engines uses (same generator, same seed), so
lines of output can stand side by side.
"""

import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from jaxinfer.cli.parser import Parser
from jaxinfer.config.fields import flatten, nearest
from jaxinfer.config.load import add_flags, config_from_args
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.errors import ConfigError
from jaxinfer.logging import configure_logging

if TYPE_CHECKING:
    from jaxinfer.engine.offline import LLM

_MIN_TOKEN_ID, _MAX_TOKEN_ID = 100, 49000  # ordinary words in the vocabularies compared


class Workload(NamedTuple):
    """`num_prompts` at once, each of `input_len` tokens, each answered by `output_len`."""

    num_prompts: int
    input_len: int
    output_len: int


PEERS = (
    Workload(1, 16, 128),
    Workload(4, 128, 128),
    Workload(16, 128, 128),
    Workload(64, 128, 128),
    Workload(64, 512, 32),
    Workload(1, 1024, 1),
)


def _random_prompts(workload: Workload, *, vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    high = min(_MAX_TOKEN_ID, vocab_size)
    low = min(_MIN_TOKEN_ID, high - 1)
    return [
        [rng.randrange(low, high) for _ in range(workload.input_len)]
        for _ in range(workload.num_prompts)
    ]


def _measure(llm: "LLM", workload: Workload, *, seed: int) -> float:
    """Seconds from the first prompt in to the last token out."""
    vocab_size = llm.get_tokenizer().vocab_size
    prompts = _random_prompts(workload, vocab_size=vocab_size, seed=seed)
    params = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True)
    start_s = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    wall_s = time.perf_counter() - start_s
    for output in outputs:
        assert len(output.outputs[0].token_ids) == workload.output_len, "an answer fell short"
    return wall_s


def _row(workload: Workload, wall_s: float) -> dict[str, Any]:
    num_output = workload.num_prompts * workload.output_len
    num_total = num_output + workload.num_prompts * workload.input_len
    return {
        "n": workload.num_prompts,
        "in": workload.input_len,
        "out": workload.output_len,
        "wall_s": round(wall_s, 3),
        "output_tok_s": round(num_output / wall_s, 1),
        "total_tok_s": round(num_total / wall_s, 1),
    }


def _measure_all(
    config: EngineConfig, workloads: Iterable[Workload], *, num_runs: int
) -> Iterable[dict[str, Any]]:
    from jaxinfer.engine.offline import LLM  # imports JAX when the engine is built

    start_s = time.perf_counter()
    with LLM(**flatten(config)) as llm:
        _measure(llm, Workload(2, 16, 4), seed=0)
        startup_s = time.perf_counter() - start_s
        common = {
            "engine": "jaxinfer",
            "model": config.model.model,
            "dtype": llm.info.dtype,
            "device": llm.info.device,
            "startup_s": round(startup_s, 1),
        }
        for workload in workloads:
            # Another seed each time: the prefix cache would know the prompts of the run before.
            walls = [_measure(llm, workload, seed=run) for run in range(num_runs)]
            yield common | _row(workload, min(walls)) | {"runs": num_runs}


def _parser() -> Parser:
    parser = Parser(prog="jaxinfer bench throughput", description="Offline tokens per second.")
    parser.add_argument("--num-prompts", type=int, default=16, help="prompts at once")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of each answer")
    parser.add_argument(
        "--workloads", choices=["peers"], help="measure a list instead: the one peers are run on"
    )
    parser.add_argument("--only", type=int, nargs="+", help="numbers of workloads, from 0")
    parser.add_argument("--num-runs", type=int, default=1, help="runs of each; the best counts")
    parser.add_argument("--json", metavar="FILE", help="also write JSON lines; - is stdout")
    parser.add_log_level("warning")
    add_flags(parser, EngineConfig, model_argument=True)
    return parser


def _workloads(args: Any) -> list[Workload]:
    for name in ("num_prompts", "input_len", "output_len", "num_runs"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(args, name)}.")
    if args.workloads is None:
        return [Workload(args.num_prompts, args.input_len, args.output_len)]
    chosen = range(len(PEERS)) if args.only is None else args.only
    for number in chosen:
        if not 0 <= number < len(PEERS):
            raise ConfigError(f"only must be between 0 and {len(PEERS) - 1}, got {number}.")
    return [PEERS[number] for number in chosen]


def _print_rows(rows: Iterable[dict[str, Any]], json_stream: TextIO | None) -> None:
    columns = ("n", "in", "out", "wall_s", "output_tok_s", "total_tok_s")
    table = sys.stderr if json_stream is sys.stdout else sys.stdout
    print("  ".join(f"{column:>12}" for column in columns), file=table)
    for row in rows:
        print("  ".join(f"{row[column]:>12}" for column in columns), file=table, flush=True)
        if json_stream is not None:
            print(json.dumps(row), file=json_stream, flush=True)


def _throughput(argv: Sequence[str]) -> int:
    args = _parser().parse(argv)
    config = config_from_args(args, EngineConfig)
    workloads = _workloads(args)
    configure_logging(args.log_level)
    rows = _measure_all(config, workloads, num_runs=args.num_runs)
    if args.json is None or args.json == "-":
        _print_rows(rows, None if args.json is None else sys.stdout)
        return 0
    try:
        with Path(args.json).open("w", encoding="utf-8") as file:
            _print_rows(rows, file)
    except OSError as error:
        raise ConfigError(f"--json {args.json}: cannot be written ({error.strerror}).") from error
    return 0


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark that the first word names."""
    if argv and argv[0] == "throughput":
        return _throughput(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print("usage: jaxinfer bench throughput [...]\n\nbenchmarks:\n  throughput  offline")
        return 0
    given = argv[0] if argv else ""
    near = " Did you mean throughput?" if nearest(given, ["throughput"]) else ""
    raise ConfigError(f"Unknown benchmark {given!r}.{near} This version has: throughput.")
