"""An argument parser whose complaints are ConfigErrors that name the nearest valid flag.

Knows argparse; nothing of what any command does. Imports nothing slow.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from jaxinfer.config.load import unknown_name_hint
from jaxinfer.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Like ArgumentParser, but `parse` raises instead of exiting (only --help exits).

    Flags may be written with `_` for `-`, as in vLLM, but never cut short: an abbreviation that
    works today would turn ambiguous with the next flag.
    """

    def __init__(self, *, prog: str, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show where an error comes from")

    def add_log_level(self, default: str) -> None:
        """--log-level, for commands whose configuration has none."""
        levels = ["debug", "info", "warning", "error"]
        self.add_argument(
            "--log-level", choices=levels, default=default, help=f"least level logged ({default})"
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")

    def _valid_flags(self) -> list[str]:
        # The help text lists every flag of every group; argparse offers no public list.
        return re.findall(r"--[a-z][a-z0-9-]*", self.format_help())

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The namespace of `argv`; raises ConfigError for whatever is not understood."""
        args, unknown = self.parse_known_args(_with_dashes(argv))
        for word in unknown:
            name = word.partition("=")[0]
            if word.startswith("-"):
                hint = unknown_name_hint(name, self._valid_flags())
                raise ConfigError(f"Unknown flag {name}.{hint} See {self.prog} --help.")
        if unknown:
            raise ConfigError(f"Unexpected argument {unknown[0]!r}. See {self.prog} --help.")
        return args


def _with_dashes(argv: Iterable[str]) -> list[str]:
    """--max_model_len=5 -> --max-model-len=5; everything after a lone -- stays as it is."""
    words, past_flags = [], False
    for word in argv:
        past_flags = past_flags or word == "--"
        if word.startswith("--") and not past_flags:
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value  # noqa: PLW2901
        words.append(word)
    return words
