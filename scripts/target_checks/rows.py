"""A row of scripts/check_targets: what a program says of itself, and what is wrong with it.

Knows what docs/results/targets.json looks like and when a figure is worse than the one there.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxinfer.planner.hlo import Collective

MIB = 2**20
TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "temp_mib": {"ratio": 1.1, "extra": 1.0},
    "code_mib": {"ratio": 1.25, "extra": 1.0},
    "argument_mib": {"ratio": 1.01, "extra": 1.0},
    "moved_mib": {"ratio": 1.03, "extra": 1.0},
}
"""A figure may be `ratio` times the stored one plus `extra`. The rest must be what it was."""
_EXACT = ("num_args", "always", "in_branches")
_TIMES = ("trace_s", "compile_s")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes are those of one device, in MiB."""

    name: str
    num_args: int
    argument_mib: float
    alias_mib: float  # of the outputs, what takes the place of inputs
    temp_mib: float
    code_mib: float
    moved_mib: float  # planner/traffic.py
    near_mib: float = 0.0  # besides: read from a GPU's L2 cache
    ideal_mib: float  # what must move; 0: not said
    always: Mapping[str, int]  # collectives of every run, by kind
    in_branches: Mapping[str, int]  # those of some runs
    trace_s: float
    compile_s: float
    largest: tuple[str, ...] = ()  # what moves most
    problems: tuple[str, ...] = field(default=())

    def stored(self) -> dict[str, Any]:
        """What targets.json keeps: nothing that differs from run to run."""
        dropped = {"name", "problems", "largest", *_TIMES}
        return {
            key: round(value, 2) if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if key not in dropped
        }

    def cells(self) -> list[str]:
        """Of a Markdown table; times that are not known are left out."""
        ratio = f"{self.moved_mib / self.ideal_mib:.2f}" if self.ideal_mib else ""
        return [
            *self.name.split(" | "),
            str(round(self.trace_s + self.compile_s)) if self.compile_s else "",
            str(self.num_args),
            *(f"{size:.0f}" for size in (self.argument_mib, self.alias_mib)),
            *(f"{size:.1f}" for size in (self.temp_mib, self.code_mib)),
            *(f"{size:.0f}" for size in (self.moved_mib, self.near_mib, self.ideal_mib)),
            ratio,
            _in_words(self.always),
            _in_words(self.in_branches),
            "; ".join(self.problems) or "ok",
        ]


def from_stored(name: str, stored: Mapping[str, Any]) -> Row:
    """The row that `Row.stored` was asked of, but for its times."""
    values = {key: value for key, value in stored.items() if key != "compiler"}
    return Row(name=name, trace_s=0.0, compile_s=0.0, **values)


STEP_HEADER = (
    "| machine | model | step | s | args | args MiB | alias | temp | code | moved | L2 | ideal "
    "| ratio | always | in branches | |\n" + "| --- " * 16 + "|"
)


def show(row: Row) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(row.cells()) + " |"


def counted(collectives: Iterable[Collective]) -> dict[str, int]:
    """How many there are of each kind."""
    return dict(sorted(Counter(item.kind for item in collectives).items()))


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def regressions(row: Row, stored: Mapping[str, Any]) -> list[str]:
    """In which figures a row is worse than the stored one of that name."""
    found = []
    for name, tolerance in stored["tolerances"].items():
        was = stored["rows"].get(row.name)
        if was is None:
            return ["not in targets.json (--update puts it there)"]
        value, bound = getattr(row, name), was[name] * tolerance["ratio"] + tolerance["extra"]
        if value > bound:
            found.append(f"{name} was {was[name]:.1f}, is {value:.1f}")
    was = stored["rows"][row.name]
    return found + [
        f"{name} was {was[name]}, is {getattr(row, name)}"
        for name in _EXACT
        if was[name] != getattr(row, name)
    ]
