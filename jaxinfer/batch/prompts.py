"""From a prompt, or a row with columns, to the body of a request.

Knows the two shapes of a prompt (messages, text) and templates; not what bodies hold besides.
"""

import string
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxinfer.config.fields import nearest
from jaxinfer.config.job import InputsConfig
from jaxinfer.errors import ConfigError

CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"


class UnusableRow(Exception):
    """A row that no prompt can be made of; the message says why."""


class _Piece(NamedTuple):
    text: str
    column: str | None  # whose value follows the text


class Template:
    """`Summarize {title}: {text}`; `{{` and `}}` are braces. Raises ConfigError for other things.

    Only whole columns can be named: a format string of Python's could reach into objects.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"inputs.template: {error}: write {{{{ for a brace.") from error
        for _, column, form, conversion in parts:
            if column is not None and (not column or form or conversion):
                raise ConfigError(
                    f"inputs.template: {{{column}}} must be the name of a column and nothing more "
                    "(write {{ for a brace)."
                )
        self._pieces = [_Piece(literal, column) for literal, column, _, _ in parts]
        self.columns = [piece.column for piece in self._pieces if piece.column is not None]
        if not self.columns:
            raise ConfigError("inputs.template names no column: every prompt would be the same.")

    def fill(self, row: Mapping[str, Any]) -> str:
        """Raises UnusableRow where a column is empty."""
        return "".join(
            piece.text + ("" if piece.column is None else _text_of(row, piece.column))
            for piece in self._pieces
        )


class PromptMaker:
    """Makes bodies as `inputs` says."""

    def __init__(self, inputs: InputsConfig) -> None:
        self._inputs = inputs
        self._template = None if inputs.template is None else Template(inputs.template)
        self.url = CHAT_URL if inputs.mode == "chat" else COMPLETION_URL

    @property
    def columns(self) -> list[str]:
        """The columns that rows must have."""
        inputs = self._inputs
        prompt = self._template.columns if self._template is not None else [inputs.column]
        return list(dict.fromkeys(name for name in (*prompt, inputs.id_column) if name is not None))

    def check_columns(self, path: str, there: Collection[str]) -> None:
        """Raises ConfigError, naming the nearest, for a column that a file lacks."""
        for name in self.columns:
            if name not in there:
                near = nearest(name, there)
                hint = f" Did you mean {near}?" if near else ""
                raise ConfigError(
                    f"inputs: {path} has no column {name!r}.{hint} It has: {', '.join(there)}."
                )

    def of_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a row's request. Raises UnusableRow."""
        if self._template is not None:
            return self.of_text(self._template.fill(row))
        column = self._inputs.column
        assert column is not None, "checked with the job"
        value = row.get(column)
        if isinstance(value, list) and self._inputs.mode == "chat":
            return {"messages": [*self._system(), *map(_without_nulls, value)]}
        if isinstance(value, list):
            return {"prompt": value}
        return self.of_text(_text_of(row, column))

    def of_text(self, prompt: str) -> dict[str, Any]:
        """The body of a prompt's request."""
        if self._inputs.mode == "completion":
            return {"prompt": prompt}
        return {"messages": [*self._system(), {"role": "user", "content": prompt}]}

    def custom_id(self, row: Mapping[str, Any], number: int) -> str:
        column = self._inputs.id_column
        value = None if column is None else row.get(column)
        return f"line-{number}" if value is None else str(value)

    def _system(self) -> list[dict[str, Any]]:
        system = self._inputs.system
        return [] if system is None else [{"role": "system", "content": system}]


def _text_of(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise UnusableRow(f"column {column!r} is empty.")
    if isinstance(value, str | int | float):
        return str(value)
    raise UnusableRow(f"column {column!r} holds a {type(value).__name__}, not a text.")


def _without_nulls(message: Any) -> Any:
    """Parquet gives each message the fields of all: those that are null were not there."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None}
