"""`jaxinfer bench throughput`: its flags and its table. The measuring is in bench/throughput.py."""

import argparse
from collections.abc import Sequence

from jaxinfer.bench.workloads import PEERS, Workload
from jaxinfer.cli.bench_output import (
    add_output_flags,
    check_counts,
    check_output,
    json_lines,
    table_stream,
)
from jaxinfer.cli.parser import Parser
from jaxinfer.config.load import add_flags, config_from_args
from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.logging import configure_logging

_COLUMNS = ("n", "in", "out", "wall_s", "output_tok_s", "total_tok_s")


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
    add_output_flags(parser)
    parser.add_log_level("warning")
    add_flags(parser, EngineConfig, model_argument=True)
    return parser


def _workloads(args: argparse.Namespace) -> list[Workload]:
    check_counts(args, num_prompts=1, input_len=1, output_len=1, num_runs=1)
    if args.workloads is None:
        if args.only is not None:
            raise ConfigError("--only chooses from a list: give --workloads peers too.")
        return [Workload(args.num_prompts, args.input_len, args.output_len)]
    chosen = range(len(PEERS)) if args.only is None else args.only
    for number in chosen:
        if not 0 <= number < len(PEERS):
            raise ConfigError(f"--only must be between 0 and {len(PEERS) - 1}, got {number}.")
    return [PEERS[number] for number in chosen]


def run(argv: Sequence[str]) -> int:
    """Prints a row per workload as it is measured."""
    args = _parser().parse(argv)
    config = config_from_args(args, EngineConfig)
    workloads = _workloads(args)
    check_output(args)
    configure_logging(args.log_level)

    from jaxinfer.bench.throughput import measure_all

    table = table_stream(args)
    rows = []
    with json_lines(args.json) as write_row:
        print("  ".join(f"{column:>12}" for column in _COLUMNS), file=table)
        for row in measure_all(config, workloads, num_runs=args.num_runs):
            print("  ".join(f"{row[column]:>12}" for column in _COLUMNS), file=table, flush=True)
            write_row(row)
            rows.append(row)
    if args.plot is not None:
        from jaxinfer.bench.plots import plot_throughput

        plot_throughput(rows, args.plot)
    return 0
