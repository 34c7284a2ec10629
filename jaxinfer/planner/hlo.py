"""Reads a compiled program's text: which collectives it has, how large, and when they run.

Knows the syntax of XLA's HLO text, as far as that is needed; imports nothing of JAX.
"""

import math
import re
from dataclasses import dataclass

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<type>[a-z]+[0-9]*(?:e\dm\d\w*)?)\[(?P<dims>[\d,]*)\]")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*)?\{\s*$")
_CALLS = re.compile(
    r"(?:calls|to_apply|async_computation|called_computations)=\{?%?(?P<name>[\w.\-]+)"
)
_GROUPS_LIST = re.compile(r"replica_groups=\{\{(?P<first>[\d,]+)\}")
_GROUPS_IOTA = re.compile(r"replica_groups=\[\d+,(?P<size>\d+)\]")
_GROUPS_MESH = re.compile(r"replica_groups=mesh\[(?P<mesh>[^\]]*)\] *\{(?P<axes>[^}]*)\}")
_AXIS = re.compile(r"'(?P<name>\w+)'=(?P<size>\d+)")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One operation that talks to other devices."""

    kind: str  # "all-reduce", ...
    num_bytes: int  # of its result on one device
    group_size: int  # devices that take part
    always: bool  # in every run of the program: not in a branch or a loop


def collectives_of(text: str) -> tuple[Collective, ...]:
    """Those of a compiled program's text, in its order."""
    computations = _split(text)
    always = _always_run(computations)
    return tuple(
        _read(match, line, always=name in always)
        for name, lines in computations.items()
        for line in lines
        if (match := _COLLECTIVE.search(line)) is not None
    )


def _split(text: str) -> dict[str, list[str]]:
    """Computation name -> its lines; the entry's is "ENTRY"."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            lines = computations.setdefault("ENTRY" if header["entry"] else header["name"], [])
        else:
            lines.append(line)
    return computations


def _always_run(computations: dict[str, list[str]]) -> set[str]:
    """Computations that the entry reaches by calls alone: not as a branch or a loop's body."""
    reached, waiting = set(), ["ENTRY"]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in computations:
            continue
        reached.add(name)
        for line in computations[name]:
            waiting += [call["name"] for call in _CALLS.finditer(line)]
    return reached


def _read(match: re.Match[str], line: str, *, always: bool) -> Collective:
    arrays = list(_ARRAY.finditer(match["result"]))
    if match["start"] and len(arrays) > 1 and match["kind"] != "all-reduce":
        # The result of a start is (operands, results, ...): the results are the larger part of
        # the first two for a gather, the smaller for a scatter.
        arrays = [arrays[1]]
    return Collective(
        kind=match["kind"],
        num_bytes=sum(_size(array) for array in arrays),
        group_size=_group_size(line),
        always=always,
    )


def _size(array: re.Match[str]) -> int:
    bits = _BITS.search(array["type"])
    num_bits = int(bits[0]) if bits is not None else 8  # "pred"
    count = 1
    for dim in filter(None, array["dims"].split(",")):
        count *= int(dim)
    return count * num_bits // 8


def _group_size(line: str) -> int:
    """Groups are listed, counted ("[1,8]<=[8]": one of eight), or axes of a mesh."""
    iota, listed, mesh = (
        pattern.search(line) for pattern in (_GROUPS_IOTA, _GROUPS_LIST, _GROUPS_MESH)
    )
    if mesh is not None:
        sizes = {axis["name"]: int(axis["size"]) for axis in _AXIS.finditer(mesh["mesh"])}
        return math.prod(sizes[name.strip("' ")] for name in mesh["axes"].split(","))
    if iota is not None:
        return int(iota["size"])
    return len(listed["first"].split(",")) if listed is not None else 1
