"""`jaxinfer plan`: does a model fit a machine that is not here, and how fast could it be.

Knows flags and where the answer is printed; the planner does the work in a child process.
"""

import argparse
from collections.abc import Sequence

import msgspec

from jaxinfer.cli.parser import Parser
from jaxinfer.config.load import add_flags, config_from_args
from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.logging import configure_logging
from jaxinfer.planner import launch
from jaxinfer.planner.messages import PlanRequest
from jaxinfer.planner.report import describe
from jaxinfer.planner.sources import find_config
from jaxinfer.planner.topologies import SUGGESTED, parse_topology


def _parser() -> Parser:
    parser = Parser(
        prog="jaxinfer plan",
        description="Plans for a machine that is not here; needs the model's config.json only. "
        "Exit code 0: it fits, 1: it does not.",
    )
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help=f"one of {', '.join(SUGGESTED)}, ..."
    )
    parser.add_argument(
        "--sweep", action="store_true", help="compare all ways to share the machine, rank them"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the largest steps (--no-compile: the arithmetic alone, in seconds)",
    )
    parser.add_argument(
        "--price-per-hour", type=float, metavar="PRICE", help="of the whole topology, for costs"
    )
    parser.add_argument(
        "--input-len", type=int, default=1024, help="tokens of the prompts that are reckoned with"
    )
    parser.add_argument("--output-len", type=int, default=1024, help="tokens of their answers")
    parser.add_log_level("warning")
    add_flags(parser, EngineConfig, model_argument=True)
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("input_len", "output_len"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least 1, got {getattr(args, name)}.")
    if args.price_per_hour is not None and args.price_per_hour <= 0:
        raise ConfigError(f"--price-per-hour must be above 0, got {args.price_per_hour}.")


def run(argv: Sequence[str]) -> int:
    """Prints the plan; 0 when the model fits, else 1."""
    args = _parser().parse(argv)
    engine = config_from_args(args, EngineConfig)
    _check(args)
    target = parse_topology(args.topology)
    configure_logging(args.log_level)
    request = PlanRequest(
        config_path=str(find_config(engine.model)),
        engine=engine,
        topology=target.name,
        sweep=args.sweep,
        compile=args.compile,
        price_per_hour=args.price_per_hour,
        input_len=args.input_len,
        output_len=args.output_len,
    )
    result = launch.plan(request, log_level=args.log_level)
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(result)).decode())
    else:
        print(describe(result))
    return 0 if result.fits else 1
