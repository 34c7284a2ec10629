"""`jaxinfer models`: the catalogue, downloads, and conversion to Orbax checkpoints."""

import argparse
import sys
from collections.abc import Callable, Sequence

from jaxinfer.cli.parser import Parser
from jaxinfer.config.fields import nearest
from jaxinfer.config.schema import ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.logging import configure_logging, get_logger, log_phase
from jaxinfer.weights.catalogue import GIB, HubSource, WheelSource, load_catalogue

_HELP = """usage: jaxinfer models COMMAND [...]

commands:
  list          the models known by name, and the least hardware that holds each
  show NAME     all that the catalogue says of one
  pull [NAME]   download a model (catalogue name or Hub id; default: the default model)
  convert MODEL -o DIR
                write a model as an Orbax checkpoint (parallel, resharding reads)"""


def _list(argv: Sequence[str]) -> int:
    Parser(prog="jaxinfer models list", description="Models known by name.").parse(argv)
    catalogue = load_catalogue()
    rows = [("NAME", "SCHEME", "GiB", "SMALLEST HARDWARE", "LICENCE")] + [
        (
            entry.name,
            entry.scheme,
            f"{entry.num_bytes / GIB:.1f}",
            catalogue.smallest_hardware(entry),
            entry.license,
        )
        for entry in catalogue.entries
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    # To stderr, so that every line of stdout is a model.
    print("This version serves the scheme bf16 only; see the README.", file=sys.stderr)
    return 0


def _source_text(source: HubSource | WheelSource) -> str:
    if isinstance(source, HubSource):
        return f"Hub: {source.repo_id}"
    return (
        f"package index: {source.package}=={source.version}, {source.file} "
        f"({source.num_bytes} bytes, sha256 {source.sha256})"
    )


def _show(argv: Sequence[str]) -> int:
    parser = Parser(prog="jaxinfer models show", description="One entry of the catalogue.")
    parser.add_argument("name", metavar="NAME")
    catalogue = load_catalogue()
    entry = catalogue.get(parser.parse(argv).name)
    rows = {
        "name": entry.name,
        "aliases": ", ".join(entry.aliases) or "-",
        "description": entry.description,
        "licence": entry.license,
        "parameters": f"{entry.num_parameters / 1e6:.1f} million",
        "scheme": entry.scheme,
        "weights": f"{entry.num_bytes / GIB:.2f} GiB in memory",
        "needs": f"{entry.min_memory_gib} GiB: {catalogue.smallest_hardware(entry)}",
    }
    for name, value in rows.items():
        print(f"{name:<12} {value}")
    for number, source in enumerate(entry.sources, start=1):
        print(f"{f'source {number}':<12} {_source_text(source)}")
    return 0


def _add_model_flags(parser: Parser) -> None:
    parser.add_argument("--revision", help="Hub revision: branch, tag or commit")
    parser.add_argument("--download-dir", help="where downloads go")


def _model_config(args: argparse.Namespace) -> ModelConfig:
    name = args.model or ModelConfig().model
    return ModelConfig(model=name, revision=args.revision, download_dir=args.download_dir)


def _pull(argv: Sequence[str]) -> int:
    parser = Parser(prog="jaxinfer models pull", description="Downloads a model.")
    parser.add_argument("model", metavar="NAME", nargs="?")
    _add_model_flags(parser)
    args = parser.parse(argv)

    from jaxinfer.engine.progress import start_progress
    from jaxinfer.weights.hub import locate_model

    with start_progress() as on_progress:
        location = locate_model(_model_config(args), on_progress)
    print(location.path)
    return 0


def _convert(argv: Sequence[str]) -> int:
    parser = Parser(prog="jaxinfer models convert", description="Writes an Orbax checkpoint.")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="new directory")
    _add_model_flags(parser)
    args = parser.parse(argv)

    from jaxinfer.engine.progress import start_progress
    from jaxinfer.weights.hub import locate_model
    from jaxinfer.weights.orbax import convert_checkpoint  # imports JAX
    from jaxinfer.weights.reader import open_checkpoint

    with start_progress() as on_progress:
        path = locate_model(_model_config(args), on_progress).path
    with log_phase(get_logger(__name__), f"convert {path.name}"):
        reader = open_checkpoint(path)
        try:
            convert_checkpoint(reader, args.output)
        finally:
            reader.close()
    print(args.output)
    return 0


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": _list,
    "show": _show,
    "pull": _pull,
    "convert": _convert,
}


def run(argv: Sequence[str]) -> int:
    """Runs the subcommand that the first word names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    command = _COMMANDS.get(argv[0])
    if command is None:
        near = nearest(argv[0], _COMMANDS)
        hint = f" Did you mean {near}?" if near else ""
        raise ConfigError(f"Unknown command {argv[0]!r}.{hint} Commands: {', '.join(_COMMANDS)}.")
    configure_logging("info")
    return command(argv[1:])
