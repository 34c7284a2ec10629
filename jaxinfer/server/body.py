"""From the bytes of a request to a typed struct, with errors a user can act on.

Every error names the field, the value and what was expected. Knows JSON and structs; nothing of
models, engines or what the fields mean.
"""

import asyncio
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import msgspec
from aiohttp import web

from jaxinfer.errors import RequestError
from jaxinfer.server.errors import ApiError

BODY_TIMEOUT_S = 60.0
_MAX_SHOWN_CHARS = 200
_MAX_IGNORED_NAMES = 32

_S = TypeVar("_S", bound=msgspec.Struct)

_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_EXPECTED = re.compile(r"^Expected `(?P<kinds>[a-z |]+)`, got `(?P<got>\w+)`")
_AT = re.compile(r" - at `(?P<path>\$[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>\w+)`")
_STEP = re.compile(r"\.(?P<key>\w+)|\[(?P<index>\d+)\]|\[\.\.\.\]")


class Parsed(NamedTuple, typing.Generic[_S]):
    """A body: the typed struct, the plain JSON it came from, and names nobody knows."""

    value: _S
    raw: dict[str, Any]
    unknown: list[str]


def show(value: Any) -> str:
    """A value for an error message: JSON, cut to a readable length."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError 408, 413 or 415 and RequestError."""
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise ApiError(413, f"The request body must not be above {limit} bytes.")
    if "Content-Type" in request.headers and request.content_type != "application/json":
        raise ApiError(
            415, f"Content-Type must be application/json, got {show(request.content_type)}."
        )
    try:
        # (Mostly it is all there, and a timer is not free.)
        async with asyncio.timeout(None if request.content.is_eof() else BODY_TIMEOUT_S):
            body = await request.read()
    except TimeoutError:
        raise ApiError(
            408, f"The request body did not arrive within {BODY_TIMEOUT_S:g} s."
        ) from None
    except web.HTTPRequestEntityTooLarge:
        raise ApiError(413, f"The request body must not be above {limit} bytes.") from None
    return decode_object(body)


def decode_object(body: bytes) -> dict[str, Any]:
    """Raises RequestError unless `body` is a JSON object (NaN and Infinity are not JSON)."""
    if not body.strip():
        raise RequestError("The request body is empty; it must be a JSON object.")
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise RequestError("The request body is nested too deeply.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise RequestError(f"The request body must be a JSON object, got {show(value)}.")
    return value


def parse(raw: dict[str, Any], struct: type[_S]) -> Parsed[_S]:
    """`raw` as a `struct`; raises RequestError that names the field, the value and the repair."""
    shape = _shape(struct)
    fields = {name: _integral(value) for name, value in raw.items() if name in shape.integers}
    plain = {**raw, **fields} if fields else raw
    try:
        value = msgspec.convert(plain, struct)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), plain) from None
    unknown = [name for name in raw if name not in shape.names]
    for name, nested in shape.nested.items():
        inner = raw.get(name)
        if isinstance(inner, dict):
            unknown += [f"{name}.{key}" for key in inner if key not in nested]
    return Parsed(value, raw, unknown)


def header_names(names: list[str]) -> str:
    """Field names as a header value: printable ASCII, bounded, whatever the client sent."""
    shown = [re.sub(r"[^\w.$-]", "?", name, flags=re.ASCII)[:64] for name in names]
    rest = len(shown) - _MAX_IGNORED_NAMES
    return ", ".join(shown[:_MAX_IGNORED_NAMES] + ([f"and {rest} more"] if rest > 0 else []))


class _Shape(NamedTuple):
    names: frozenset[str]
    integers: frozenset[str]  # fields that may be int and not float
    nested: Mapping[str, frozenset[str]]  # names of the fields of fields that are structs


@cache
def _shape(struct: type[msgspec.Struct]) -> _Shape:
    fields = msgspec.structs.fields(struct)
    options = {field.name: _options(field.type) for field in fields}
    integers = {name for name, kinds in options.items() if int in kinds and float not in kinds}
    nested = {
        name: frozenset(field.name for field in msgspec.structs.fields(kind))
        for name, kinds in options.items()
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    }
    return _Shape(frozenset(options), frozenset(integers), nested)


def _options(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _integral(value: Any) -> Any:
    """1.0 is taken for 1 where an integer is due, as vLLM does; 1.5 stays and is refused."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _field_error(text: str, raw: dict[str, Any]) -> RequestError:
    at = _AT.search(text)
    path = at["path"] if at else "$"
    if missing := _MISSING.match(text):
        name = _public_name(f"{path}.{missing['name']}")
        return RequestError(f"{name} is required.", param=name)
    name, value = _public_name(path), _lookup(raw, path)
    expected = _EXPECTED.match(text)
    if expected is None:
        return RequestError(f"{name}: {text}, got {show(value)}.", param=name)
    # null only means "not given": naming it in the repair would not help.
    kinds = [kind for kind in expected["kinds"].split(" | ") if kind != "null"]
    what = " or ".join(_KINDS.get(kind, kind) for kind in kinds)
    got = "" if path.endswith("[...]") else f", got {show(value)}"
    return RequestError(f"{name} must be {what}{got}.", param=name)


def _public_name(path: str) -> str:
    return path.removeprefix("$").removeprefix(".") or "body"


def _lookup(raw: Any, path: str) -> Any:
    """The value at a msgspec path such as `$.messages[0].content`."""
    for step in _STEP.finditer(path):
        if step["key"] and isinstance(raw, dict):
            raw = raw.get(step["key"])
        elif step["index"] and isinstance(raw, list):
            raw = raw[int(step["index"])]
    return raw
