"""How far results may be from what they should be: one table for all tests of numbers.

Errors of logits are relative to the largest logit of the model.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Tolerance(NamedTuple):
    """|result - expected| <= absolute + relative * |expected|."""

    absolute: float
    relative: float


ATTENTION: Mapping[str, Tolerance] = MappingProxyType(
    {
        "float32": Tolerance(2e-6, 2e-5),
        "bfloat16": Tolerance(1e-2, 1e-2),  # the result is rounded to 8 bits: 1/256
    }
)
"""Of the paged attention op, by storage dtype; values are normally distributed."""
