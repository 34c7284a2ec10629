"""How a long piece of work tells where it is. Knows nobody who listens."""

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""(phase, done, total): called as work goes on; total 0 means that it is not known."""


def ignore_progress(phase: str, done: int, total: int) -> None:
    """A callback for those who do not care."""
    del phase, done, total


_LEAST_BYTES = 10 * 2**20  # only bytes come in such numbers


def shown_amount(done: int, total: int) -> str:
    """How far a phase is, for people: "3/10", "12/94 MiB", or nothing where it is not known."""
    if total <= 0:
        return ""
    if total >= _LEAST_BYTES:
        return f"{done / 2**20:.0f}/{total / 2**20:.0f} MiB"
    return f"{done}/{total}"
