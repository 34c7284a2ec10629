"""The `jaxinfer` command: finds the subcommand, imports it, and turns errors into one line.

Knows the names of the subcommands only; their modules (and what those import) are loaded when
they are called, so that `jaxinfer --help` answers at once. Exit codes: 0 done, 1 it failed,
2 the command line or the configuration is wrong, 130 interrupted.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jaxinfer.errors import ConfigError, JaxInferError


class Command(NamedTuple):
    """A subcommand: a module with `run(argv) -> int`."""

    module: str
    summary: str


COMMANDS = {
    "serve": Command("jaxinfer.cli.serve", "OpenAI-style HTTP server"),
    "run": Command("jaxinfer.cli.run", "batch job from a YAML file"),
    "run-batch": Command("jaxinfer.cli.run_batch", "answer an OpenAI batch file"),
    "generate": Command("jaxinfer.cli.generate", "complete one prompt"),
    "chat": Command("jaxinfer.cli.chat", "talk to a model in the terminal"),
    "models": Command("jaxinfer.cli.models", "list, show, pull and convert models"),
    "info": Command("jaxinfer.cli.info", "versions, devices, what is enabled and why not"),
    "plan": Command("jaxinfer.cli.plan", "does a model fit a machine, and how fast could it be"),
    "build": Command("jaxinfer.cli.build", "compile a model's programs ahead of its start"),
    "bench": Command("jaxinfer.cli.bench", "measure throughput"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxinfer COMMAND [...]",
            "",
            "A JAX/XLA-first LLM inference engine.",
            "",
            "commands:",
            *lines,
            "",
            "jaxinfer COMMAND --help says more; jaxinfer --version prints the version.",
        ]
    )


def _version() -> str:
    from importlib.metadata import version

    return version("jaxinfer")


def _unknown_command(name: str) -> ConfigError:
    from jaxinfer.config.fields import nearest

    near = nearest(name, COMMANDS)
    hint = f" Did you mean {near}?" if near else ""
    return ConfigError(f"Unknown command {name!r}.{hint} Commands: {', '.join(COMMANDS)}.")


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version", "version"):
        print(_version())
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        raise _unknown_command(argv[0])
    return importlib.import_module(command.module).run(argv[1:])


def _report(error: JaxInferError, argv: Sequence[str]) -> int:
    if "--debug" in argv:
        raise error
    command = f"jaxinfer {argv[0]}" if argv and argv[0] in COMMANDS else "jaxinfer"
    print(f"{command}: error: {error}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (--help of a command exits by itself)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except JaxInferError as error:
        return _report(error, argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`jaxinfer models list | head`); say nothing more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
