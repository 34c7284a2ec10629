"""The settings of a configuration class, read off its dataclass fields. Knows no files, no argv.

A *setting* is one leaf field of the tree in `config/schema.py`. Its name is unique in the tree, so
flags, YAML keys and keyword arguments need no section names.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

Kind = Literal["str", "int", "float", "bool", "choice", "int_list", "str_list", "dict"]
ConfigT = TypeVar("ConfigT")

_KINDS: dict[Any, Kind] = {
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
    list[int]: "int_list",
    list[str]: "str_list",
    dict[str, Any]: "dict",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One leaf field: what can be said about it on a command line."""

    name: str
    section: str  # name of the class that holds it
    kind: Kind
    choices: tuple[str, ...]  # of kind "choice"
    optional: bool  # None is a value
    default: Any
    help: str
    aliases: tuple[str, ...]
    metavar: str | None
    units: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _kind_of(annotation: Any) -> tuple[Kind, tuple[str, ...], bool]:
    """(kind, choices, optional) of a field's annotation."""
    optional = False
    if typing.get_origin(annotation) in (Union, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        assert len(rest) == 1, f"a setting has one type, or None: {annotation}"
        annotation, optional = rest[0], True
    if typing.get_origin(annotation) is Literal:
        return "choice", typing.get_args(annotation), optional
    return _KINDS[annotation], (), optional


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _leaves(config_type: type) -> Iterator[Setting]:
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        annotation = hints[field.name]
        if dataclasses.is_dataclass(annotation):
            yield from _leaves(typing.cast(type, annotation))
            continue
        kind, choices, optional = _kind_of(annotation)
        yield Setting(
            name=field.name,
            section=config_type.__name__,
            kind=kind,
            choices=choices,
            optional=optional,
            default=_default_of(field),
            help=field.metadata["help"],
            aliases=field.metadata["aliases"],
            metavar=field.metadata["metavar"],
            units=field.metadata["units"],
        )


@functools.cache
def settings_of(config_type: type) -> Mapping[str, Setting]:
    """Name -> setting, for every leaf of the tree, in the order of the fields."""
    settings: dict[str, Setting] = {}
    for setting in _leaves(config_type):
        assert setting.name not in settings, f"two settings are called {setting.name}"
        settings[setting.name] = setting
    return types.MappingProxyType(settings)


def build(config_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """A `config_type` tree with `values` (converted, by setting name) over the defaults."""
    hints = typing.get_type_hints(config_type)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, config_type)):
        annotation = hints[field.name]
        if dataclasses.is_dataclass(annotation):
            arguments[field.name] = build(typing.cast(type, annotation), values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return config_type(**arguments)


def flatten(config: Any) -> dict[str, Any]:
    """Setting name -> value: the inverse of `build`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= flatten(value)
        else:
            values[field.name] = value
    return values


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is most like `name`, if any is like it at all."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return found[0] if found else None
