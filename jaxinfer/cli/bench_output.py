"""Where the benchmarks' figures go: flags for it, JSON lines, the stream for tables.

Knows files; nothing of what is measured.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import msgspec

from jaxinfer.errors import ConfigError

WriteRow = Callable[[Any], None]


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        "--output-json",
        metavar="FILE",
        help="also write a JSON line for each row of the table; - is stdout",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="also plot (needs jaxinfer[bench])")


def check_output(args: argparse.Namespace) -> None:
    """Raises ConfigError for a plot that cannot be made, before anything is measured."""
    if args.plot is not None:
        from jaxinfer.bench.plots import check_can_plot

        check_can_plot(args.plot)


def table_stream(args: argparse.Namespace) -> TextIO:
    """stdout is for the JSON when that was asked for."""
    return sys.stderr if args.json == "-" else sys.stdout


@contextmanager
def json_lines(path: str | None) -> Iterator[WriteRow]:
    """Gives what writes a row. Raises ConfigError, before anything is measured, for a bad path."""
    if path is None:
        yield lambda _: None
    elif path == "-":
        yield lambda row: _write(sys.stdout, row)
    else:
        try:
            file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - closed below
        except OSError as error:
            raise ConfigError(f"--json {path}: cannot be written ({error.strerror}).") from error
        with file:
            yield lambda row: _write(file, row)


def _write(stream: TextIO, row: Any) -> None:
    print(msgspec.json.encode(row).decode(), file=stream, flush=True)


def check_counts(args: argparse.Namespace, **at_least: int) -> None:
    """Raises ConfigError for a count that is too small."""
    for name, low in at_least.items():
        value = getattr(args, name)
        if value < low:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least {low}, got {value}.")
