"""`jaxinfer plan`: does a model fit a machine that is not here, and how fast could it be.

Knows flags and where the answer is printed; the planner does the work in a child process.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import msgspec

from jaxinfer.cli.parser import Parser
from jaxinfer.config.load import add_flags, config_from_args
from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import ConfigError, UserError
from jaxinfer.logging import configure_logging
from jaxinfer.planner import launch
from jaxinfer.planner.messages import PlanRequest, PlanResult
from jaxinfer.planner.report import describe
from jaxinfer.planner.sources import find_config
from jaxinfer.planner.topologies import SUGGESTED, parse_topology

_DOES_NOT_FIT, _DIED = 1, 3  # exit codes


def _parser() -> Parser:
    parser = Parser(
        prog="jaxinfer plan",
        description="Plans for a machine that is not here; needs the model's config.json only. "
        "Exit code 0: it fits, 1: it does not, 2: something that was given is wrong, 3: the "
        "compiler's process died.",
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
    price = args.price_per_hour
    if price is not None and not 0 < price < math.inf:  # nan is neither
        raise ConfigError(f"--price-per-hour must be a number above 0, got {price}.")


def run(argv: Sequence[str]) -> int:
    """Prints the plan; the exit codes are those that --help lists."""
    args = _parser().parse(argv)
    try:
        result = _ask(args)
    except ConfigError:
        raise
    except UserError as error:  # a model or a file: bad input too, and 1 is taken for a "no"
        raise ConfigError(str(error)) from error
    except launch.PlannerDiedError as error:
        print(f"jaxinfer plan: error: {error}", file=sys.stderr)
        return _DIED
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(result)).decode())
    else:
        print(describe(result))
    return 0 if result.fits else _DOES_NOT_FIT


def _ask(args: argparse.Namespace) -> PlanResult:
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
    return launch.plan(request, log_level=args.log_level)
