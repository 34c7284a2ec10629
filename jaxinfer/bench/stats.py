"""Distributions of measured times, and how they are shown. Knows numbers only."""

from collections.abc import Sequence

import msgspec
import numpy as np

PERCENTILES = (50, 90, 99)


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """A sample in a few numbers; all in the unit of the sample (seconds, unless said)."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float


def distribution(values: Sequence[float] | np.ndarray) -> Distribution | None:
    """None of an empty sample. Percentiles are interpolated linearly between the neighbours."""
    if len(values) == 0:
        return None
    sample = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = np.percentile(sample, PERCENTILES).tolist()
    return Distribution(
        count=len(sample),
        mean=float(sample.mean()),
        min=float(sample.min()),
        p50=p50,
        p90=p90,
        p99=p99,
        max=float(sample.max()),
    )


def cumulative(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the sample's cumulative distribution: the share of values that are <= x."""
    sorted_x = np.sort(np.asarray(values, dtype=np.float64))
    return sorted_x, np.arange(1, len(sorted_x) + 1) / max(1, len(sorted_x))


def rate_over_time(times_s: Sequence[float] | np.ndarray, bin_s: float) -> np.ndarray:
    """Events per second in each interval of `bin_s` from 0 to the last event."""
    times = np.asarray(times_s, dtype=np.float64)
    if times.size == 0:
        return np.zeros(0)
    return np.bincount((times / bin_s).astype(np.int64)) / bin_s


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
