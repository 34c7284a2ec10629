"""How far results may be from what they should be: one table for all tests of numbers."""

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
        "bfloat16": Tolerance(1e-2, 1e-2),  # the result is rounded to 8 bits
    }
)
"""Of the paged attention op, by dtype of its operands; values are normally distributed."""

LOGITS_FLOAT32 = 2e-5
"""Largest error of a model's logits, relative to the largest logit. Measured: up to 4e-6."""

LOGITS_BFLOAT16 = 1.3
"""Root mean square of the logits' error, relative to that of transformers in bfloat16."""

SWITCH = 100 * LOGITS_FLOAT32
"""A switch of config.json that is ignored changes logits at least so much."""
