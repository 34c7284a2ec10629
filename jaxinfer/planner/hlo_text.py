"""The text of a compiled program as operations: names, shapes, operands.

Knows the syntax of XLA's HLO text; nothing of what operations mean. Imports nothing of JAX.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(
    r"(?P<type>pred|[a-z]+\d+(?:e\dm\d\w*)?)\[(?P<dims>[\d,]*)\](?P<layout>\{[^{}]*\})?"
)
_SPACE = re.compile(r"S\((\d+)\)")


class Array(NamedTuple):
    """An operation's result, or a part of it."""

    num_bytes: int
    dims: tuple[int, ...]
    in_memory: bool


class Operation(NamedTuple):
    """A line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


def parse_program(text: str) -> dict[str, list[Operation]]:
    """Computation name -> its operations; the entry's is "ENTRY"."""
    computations: dict[str, list[Operation]] = {}
    current: list[Operation] = []
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header is not None:
            current = computations.setdefault("ENTRY" if header["entry"] else header["name"], [])
            continue
        match = _INSTRUCTION.match(line)
        if match is not None:
            current.append(_parse_op(match["name"], match["rest"], is_root=bool(match["root"])))
    return computations


def _parse_op(name: str, rest: str, *, is_root: bool) -> Operation:
    """`rest` is `TYPE OPCODE(OPERANDS), ATTRIBUTES`; the type may be a tuple."""
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    results, call = rest[:end], rest[end:].lstrip()
    opcode, operands_on = call.split("(", 1)
    length = _closing("(" + operands_on) - 2
    operands, attributes = operands_on[:length], operands_on[length + 1 :]
    if opcode == "parameter":
        attributes = f"parameter({operands})"
    return Operation(
        name=name,
        opcode=opcode,
        results=tuple(_arrays_of(results)),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        attributes=attributes,
        is_root=is_root,
    )


def _closing(text: str) -> int:
    """One behind the parenthesis that closes the first."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index + 1
    raise AssertionError(f"unbalanced: {text[:80]}")


def _arrays_of(type_text: str) -> Iterable[Array]:
    for match in _ARRAY.finditer(type_text):
        dims = tuple(int(size) for size in match["dims"].split(",") if size)
        bits = re.search(r"\d+", match["type"])
        space = _SPACE.search(match["layout"] or "")
        yield Array(
            num_bytes=math.prod(dims) * (int(bits[0]) if bits else 8) // 8,
            dims=dims,
            in_memory=space is None or space[1] == "0",
        )
