"""`jaxinfer serve`: reads the settings and hands them to the server. Knows nothing of HTTP."""

from collections.abc import Sequence

from jaxinfer.cli.parser import Parser
from jaxinfer.config.fields import flatten
from jaxinfer.config.load import add_flags, serve_config
from jaxinfer.config.preview import local_model_facts, preview
from jaxinfer.config.schema import ServeConfig
from jaxinfer.logging import configure_logging


def run(argv: Sequence[str]) -> int:
    """Serves until a signal; 0 after an orderly end."""
    parser = Parser(prog="jaxinfer serve", description="OpenAI-style HTTP server.")
    add_flags(parser, ServeConfig, model_argument=True)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the settings come to, and end"
    )
    args = parser.parse(argv)
    config = serve_config(args)
    if args.dry_run:
        model = local_model_facts(config.engine.model.model)
        print(preview(config.engine, flatten(config.server), model=model), end="")
        return 0
    configure_logging(config.server.log_level, process="server")

    from jaxinfer.server.run import run_server  # after the flags: errors in those come at once

    run_server(config)
    return 0
