"""How many bytes a compiled program moves to and from the device's memory, read from its text.

XLA's own figure ("bytes accessed") cannot be compared with what must move: it counts what stays on
the chip, whole tables of which a few rows are read, both branches of a conditional, and the upper
bound that a kernel gives its scheduler. Here an operation moves its operands and results that lie
in memory (a TPU's program says which lie in VMEM instead), of a slice or gather what it takes, of
an update what it writes, of a fusion what its results need; of a conditional the branch that moves
less (greedy sampling, no log-probabilities); of a loop its body as often as XLA knows it to run,
once otherwise. What was written a moment ago a GPU reads from its L2 cache; its program does not
say so, but it is so if little was moved in between.

A cache of pages is left out of the figure: what a kernel reads of it depends on the step. Instead
`page_bytes` is what anything but kernels moves of it: nothing, or the step's own rows where XLA
writes them.

Knows what operations mean, and attributes of XLA's HLO text; imports nothing of JAX.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.planner.hlo_text import Array, Operation, parse_program

_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|true_computation=([^,]+), false_computation=([^,\s]+)"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_PADDING = re.compile(r"window=\{[^}]*pad=([-\d_x]+)")
_LABELS = re.compile(r"dim_labels=(\w+?)_")
_BODY = re.compile(r"body=%?([\w.\-]+)")

_FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota
    opt-barrier copy-done slice-done async-done call-done all-reduce-done all-gather-done
    reduce-scatter-done collective-permute-done async-update""".split()
)
_NAMES = frozenset(
    """bitcast get-tuple-element all-reduce-done all-gather-done reduce-scatter-done
    collective-permute-done""".split()
)
_VIEWS = frozenset({"bitcast", "reshape", "copy", "transpose", "convert"})
_SPREADS = frozenset({"pad", "concatenate"})  # elements to other places
_NEEDS_ALL = frozenset("dot convolution reduce-window sort reverse custom-call tuple".split())
_TAKES = frozenset({"gather", "slice", "dynamic-slice"})
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written


class Moved(NamedTuple):
    """One operation and the bytes it moves, over all its runs."""

    num_bytes: int
    opcode: str
    where: str  # in the traced program, as far as XLA says


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Of one run of the program on one device."""

    num_bytes: int  # without the pages
    near_bytes: int  # besides: read from a cache
    page_bytes: int  # of the pages, by anything but kernels
    largest: tuple[Moved, ...]  # largest first


class _Access(NamedTuple):
    """An operation's read or write of an array."""

    num_bytes: int
    array: Array
    read_from: str | None  # the operation that wrote it; None: it is written here


def traffic_of(
    text: str, *, pages: tuple[int, ...], cache_bytes: int = 0, num_largest: int = 10
) -> Traffic:
    """`pages` is the shape of a layer's pages on one device. In a cache of `cache_bytes` is what
    was written since no more than a quarter of it was moved."""
    run = _Program(parse_program(text), pages, near_bytes=cache_bytes // 4).run("ENTRY")
    return Traffic(
        num_bytes=run.num_bytes,
        near_bytes=run.near_bytes,
        page_bytes=run.page_bytes,
        largest=tuple(sorted(run.moved, reverse=True)[:num_largest]),
    )


@dataclass(kw_only=True)
class _Run:
    """What a computation moves; while it runs, how far ago its values were written."""

    moved: list[Moved] = field(default_factory=list)
    num_bytes: int = 0
    near_bytes: int = 0
    page_bytes: int = 0
    written: dict[str, int] = field(default_factory=dict)  # `num_bytes` behind the operation

    def add(self, run: "_Run", *, times: int) -> None:
        """Another one, that was run inside."""
        self.moved += [item._replace(num_bytes=times * item.num_bytes) for item in run.moved]
        self.num_bytes += times * run.num_bytes
        self.near_bytes += times * run.near_bytes
        self.page_bytes += times * run.page_bytes

    def distance(self, access: _Access) -> float:
        """Bytes that were moved from the beginning of its writing on."""
        if access.read_from not in self.written:
            return math.inf
        return self.num_bytes - self.written[access.read_from] + access.array.num_bytes


class _Program:
    """The computations of a program, and what running one of them moves."""

    def __init__(
        self,
        computations: Mapping[str, Sequence[Operation]],
        pages: tuple[int, ...],
        *,
        near_bytes: int = 0,
    ) -> None:
        self.computations = computations
        self.pages = pages
        self.near_bytes = near_bytes

    def run(self, name: str, written: Sequence[int | None] = ()) -> _Run:
        """Runs a computation; `written` is when the elements of its argument were, before now."""
        ops = {op.name: op for op in self.computations[name]}
        run = _Run()
        for op in ops.values():
            if op.opcode == "get-tuple-element" and ops[op.operands[0]].opcode == "parameter":
                index = int(op.attributes.partition("index=")[2].partition(",")[0])
                before = written[index] if index < len(written) else None
                if before is not None:
                    run.written[op.name] = before
                continue
            inside = self._inside(op, ops, run)
            if inside is not None:
                times, inner = inside
                run.add(inner, times=times)
                continue
            is_kernel = op.opcode == "custom-call"
            num_bytes, touches_pages = 0, False
            for access in self._accesses(op, ops):
                if self._is_cache(access.array.dims, is_kernel=is_kernel):
                    touches_pages = True
                    run.page_bytes += 0 if is_kernel else access.num_bytes
                elif run.distance(access) <= self.near_bytes:
                    run.near_bytes += access.num_bytes
                else:
                    num_bytes += access.num_bytes
            run.num_bytes += num_bytes
            if is_kernel and touches_pages:  # which may be many, and take the place of all else
                run.written.clear()
            elif op.opcode not in _FREE:
                run.written[op.name] = run.num_bytes
            if num_bytes:
                found = _OP_NAME.search(op.attributes)
                run.moved.append(Moved(num_bytes, op.opcode, found[1] if found else op.name))
        return run

    def _is_cache(self, dims: tuple[int, ...], *, is_kernel: bool) -> bool:
        """The pages; a kernel may see them in another shape."""
        return dims == self.pages or (is_kernel and math.prod(dims) == math.prod(self.pages))

    def _inside(
        self, op: Operation, ops: Mapping[str, Operation], run: _Run
    ) -> tuple[int, _Run] | None:
        """What control flow runs, and how often; None for an operation that moves bytes itself."""
        branches = _BRANCHES.search(op.attributes)
        if op.opcode == "conditional" and branches is not None:
            names = branches[1].split(",") if branches[1] else branches.group(2, 3)
            runs = [
                self.run(name.strip().lstrip("%"), _written_before(argument, ops, run))
                for name, argument in zip(names, op.operands[1:], strict=True)
            ]
            return 1, min(runs, key=lambda run: run.num_bytes)
        if op.opcode == "while":
            body, trips = _BODY.search(op.attributes), _TRIPS.search(op.attributes)
            assert body is not None, op.name
            return int(trips[1]) if trips else 1, self.run(body[1])
        called = _CALLED.search(op.attributes)
        if op.opcode in ("call", "async-start", "call-start") and called is not None:
            return 1, self.run(called[1])
        return None

    def _accesses(self, op: Operation, ops: Mapping[str, Operation]) -> list[_Access]:
        """What an operation reads and writes."""
        if op.opcode in _FREE or "cross_program_prefetch_index" in op.attributes:
            return []  # such a prefetch is of the next run's weights, or of this one's by the last
        if op.opcode in ("copy-start", "slice-start"):
            return _copied(op)
        body = {}
        called = _CALLED.search(op.attributes)
        if op.opcode == "fusion" and called is not None:
            body = {inner.name: inner for inner in self.computations[called[1]]}
        reads = [
            _Access(size, array, _writer_of(name, ops))
            for index, name in enumerate(dict.fromkeys(op.operands))
            if name in ops
            for array in ops[name].results
            if array.in_memory
            and (size := _taken(op, op.operands.index(name), array, body, ops)) is not None
        ]
        written = _written(op, body, ops)
        results = op.results[-1:] if op.opcode.endswith("-start") else op.results
        return reads + [
            _Access(min(array.num_bytes, written or array.num_bytes), array, None)
            for array in results
            if array.in_memory
        ]


def _writer_of(name: str, ops: Mapping[str, Operation]) -> str:
    """The operation that made a value, behind others that only name it."""
    op = ops[name]
    while op.opcode in _NAMES and ops[op.operands[0]].opcode != "parameter":
        op = ops[op.operands[0]]
    return op.name


def _written_before(argument: str, ops: Mapping[str, Operation], run: _Run) -> list[int | None]:
    """When the elements of a tuple were written, in bytes before now (at most 0)."""
    if ops[argument].opcode != "tuple":
        return []
    times = [run.written.get(_writer_of(name, ops)) for name in ops[argument].operands]
    return [None if time is None else time - run.num_bytes for time in times]


def _copied(op: Operation) -> list[_Access]:
    """A copy's result is (to, from, token); a slice's (from, to, token): both move the smaller."""
    arrays = [array for array in op.results if array.num_bytes > 4][:2]
    size = min((array.num_bytes for array in arrays), default=0)
    return [_Access(size, array, None) for array in arrays if array.in_memory]


def _taken(
    op: Operation,
    operand: int,
    array: Array,
    body: Mapping[str, Operation],
    ops: Mapping[str, Operation],
) -> int | None:
    """Bytes of an operand that are read."""
    if not body:
        if op.opcode in _TAKES and operand == 0:
            return op.results[0].num_bytes
        if op.opcode in _UPDATES and operand == 0:
            return _size(ops, op.operands[_UPDATES[op.opcode]])
        return array.num_bytes
    parameter = f"parameter({operand})"
    start = next((inner for inner in body.values() if parameter in inner.attributes), None)
    if start is None:
        return array.num_bytes
    return math.ceil(array.num_bytes * _needed(start, body, {}))


def _needed(value: Operation, body: Mapping[str, Operation], known: dict[str, float]) -> float:
    """The part of a value inside a fusion that the results need, at most 1: each element is
    computed where it is used. `known` are those of other values."""
    if value.is_root:
        return 1.0
    if value.name not in known:
        elements = _elements(value)
        needed = sum(
            _needed_by(user, index, elements, body, known)
            for user in body.values()
            for index, name in enumerate(user.operands)
            if name == value.name
        )
        known[value.name] = min(1.0, needed / max(elements, 1))
    return known[value.name]


def _needed_by(
    user: Operation,
    operand: int,
    elements: int,
    body: Mapping[str, Operation],
    known: dict[str, float],
) -> float:
    """Elements of an operand of so many, that as much of `user` needs as is needed."""
    if user.opcode in _UPDATES:
        update = user.operands[_UPDATES[user.opcode]]
        return _elements(body[update]) if operand == 0 and update in body else elements
    part = _needed(user, body, known)
    if user.opcode in _TAKES:
        return part * _elements(user) if operand == 0 else elements
    if user.opcode == "broadcast":
        return min(elements, part * _elements(user))
    if user.opcode == "convolution" and operand == 0:
        return elements * _part_of_window(user, body)
    if user.opcode in _NEEDS_ALL:
        return elements
    is_shared_out = user.opcode in _VIEWS or user.opcode in _SPREADS or user.opcode == "reduce"
    if is_shared_out or elements == _elements(user):
        return part * elements
    return elements


def _part_of_window(op: Operation, body: Mapping[str, Operation]) -> float:
    """Of a convolution's first operand: negative padding cuts (XLA's way to slice for it)."""
    padding, labels = _PADDING.search(op.attributes), _LABELS.search(op.attributes)
    if padding is None or labels is None:
        return 1.0
    dims, part = body[op.operands[0]].results[0].dims, 1.0
    for nth, pair in enumerate(padding[1].split("x")):
        cut = sum(min(0, int(size)) for size in pair.split("_"))
        part *= 1 + cut / dims[labels[1].index(str(nth))]
    return part


def _elements(op: Operation) -> int:
    return sum(math.prod(array.dims) for array in op.results)


def _written(
    op: Operation, body: Mapping[str, Operation], ops: Mapping[str, Operation]
) -> int | None:
    """Bytes of a result that are written, where an operation changes a part of it in place."""
    if not body:
        if op.opcode in _UPDATES:
            return _size(ops, op.operands[_UPDATES[op.opcode]])
        return None
    root = next((inner for inner in body.values() if inner.is_root), None)
    while root is not None and root.opcode in _VIEWS:
        root = body.get(root.operands[0])
    if root is None or root.opcode not in _UPDATES:
        return None
    return _size(body, root.operands[_UPDATES[root.opcode]])


def _size(ops: Mapping[str, Operation], name: str) -> int:
    return sum(array.num_bytes for array in ops[name].results) if name in ops else 0
