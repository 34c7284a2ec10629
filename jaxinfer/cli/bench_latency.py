"""`jaxinfer bench latency`: its flags and its table. The measuring is in bench/latency.py."""

from collections.abc import Sequence

from jaxinfer.bench.workloads import Workload
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
from jaxinfer.logging import configure_logging


def _parser() -> Parser:
    parser = Parser(
        prog="jaxinfer bench latency",
        description="Offline times of one batch after the other: first token, between tokens, all.",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts of a batch")
    parser.add_argument("--input-len", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--num-iters", type=int, default=30, help="batches measured")
    parser.add_argument(
        "--num-iters-warmup", type=int, default=3, help="batches before them, not counted"
    )
    add_output_flags(parser)
    parser.add_log_level("warning")
    add_flags(parser, EngineConfig, model_argument=True)
    return parser


def run(argv: Sequence[str]) -> int:
    """Prints one table."""
    args = _parser().parse(argv)
    config = config_from_args(args, EngineConfig)
    check_counts(args, batch_size=1, input_len=1, output_len=1, num_iters=1, num_iters_warmup=0)
    check_output(args)
    configure_logging(args.log_level)

    from jaxinfer.bench.latency import LatencySettings, measure_latency
    from jaxinfer.bench.tables import latency_table

    settings = LatencySettings(
        workload=Workload(args.batch_size, args.input_len, args.output_len),
        num_iters=args.num_iters,
        num_iters_warmup=args.num_iters_warmup,
        seed=config.model.seed,
    )
    with json_lines(args.json) as write_row:
        latency = measure_latency(config, settings)
        print("\n".join(latency_table(latency.report)), file=table_stream(args))
        write_row(latency.report)
    if args.plot is not None:
        from jaxinfer.bench.plots import plot_latency

        plot_latency(latency, args.plot)
    return 0
