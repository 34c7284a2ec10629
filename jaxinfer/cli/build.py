"""`jaxinfer build`: the compile cache of a model, made in advance to be shipped.

Knows flags; the planner does the work in a child process.
"""

from collections.abc import Sequence

from jaxinfer.cli.parser import Parser
from jaxinfer.config.load import add_flags, config_from_args
from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.logging import configure_logging
from jaxinfer.planner import launch
from jaxinfer.planner.messages import BuildRequest
from jaxinfer.planner.sources import find_config
from jaxinfer.planner.topologies import SUGGESTED, parse_topology


def _parser() -> Parser:
    parser = Parser(
        prog="jaxinfer build",
        description="Compiles a model's programs into a directory for `serve --compile-cache`.",
    )
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help=f"one of {', '.join(SUGGESTED)}, ..."
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the compile cache; may exist"
    )
    parser.add_log_level("info")
    add_flags(parser, EngineConfig, model_argument=True)
    return parser


def run(argv: Sequence[str]) -> int:
    """Prints the flags to serve with."""
    args = _parser().parse(argv)
    engine = config_from_args(args, EngineConfig)
    if engine.compile.compile_cache != "auto":
        raise ConfigError(
            f"--compile-cache={engine.compile.compile_cache}: the programs go where --output says. "
            "Leave it out."
        )
    target = parse_topology(args.topology)
    configure_logging(args.log_level)
    # On a CPU the model itself is started, so its weights are found (or downloaded) there.
    path = "" if target.chip.platform == "cpu" else str(find_config(engine.model))
    request = BuildRequest(
        config_path=path, engine=engine, topology=target.name, directory=args.output
    )
    result = launch.build(request, log_level=args.log_level)
    print(
        f"{result.num_programs} programs for {result.topology} in {result.directory} "
        f"({result.num_bytes / 2**20:.1f} MiB, {result.wall_s:.0f} s)"
    )
    print(f"serve with the same settings and {result.serve_flags}")
    for note in result.notes:
        print(note)
    return 0
