"""Names of machines that need not be here ("v6e:2x4", "h100x8") and what they stand for.

Knows chips and how they may be put together; imports no JAX. devices.py makes of a Target what
JAX compiles for.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxinfer.errors import ConfigError
from jaxinfer.planner.chips import CHIPS, Chip, cpu_chip
from jaxinfer.runner.memory import available_cpu_bytes

_TPU_NAME = re.compile(r"(?P<chip>v5e|v5p|v6e|tpu7x):(?P<grid>\d+(x\d+){1,2})")
_GPU_NAME = re.compile(r"(?P<chip>[a-z]+\d+(-\d+g)?)(x(?P<count>\d+))?")
_CPU_NAME = re.compile(r"cpu(x(?P<count>\d+))?")
_CHIPS_PER_HOST = 4  # of the TPU hosts whose chips the compiler counts by the host
_MOST_DEVICES = 1024
_DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}

SUGGESTED = (
    *("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v6e:1x1", "v6e:2x2", "v6e:2x4", "v6e:4x4"),
    *("v5p:2x2x1", "v5p:2x2x2", "tpu7x:1x1x1", "tpu7x:2x2x1", "tpu7x:2x2x2"),
    *("a100-80g", "a100-80gx8", "h100", "h100x8", "h200", "h200x8", "b200", "b200x8"),
    "cpu",
)
"""Usual ones, for messages; larger grids and other counts go as well."""

_FLAT_SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8")
_FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "v5e": _FLAT_SLICES,
        "v6e": _FLAT_SLICES,
        "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
        "tpu7x": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    }
)
_GPUS_OF_A_HOST = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A machine to plan for."""

    name: str
    chip: Chip
    grid: tuple[int, ...]  # chips along each direction; a GPU host is a row

    @property
    def num_devices(self) -> int:
        """As JAX counts them."""
        return math.prod(self.grid) * self.chip.devices_per_chip

    @property
    def chips_per_host(self) -> tuple[int, int, int]:
        """TPU: the part of the grid that one host has; smaller slices have one host."""
        if math.prod(self.grid) < _CHIPS_PER_HOST:
            return (*self.grid, 1, 1)[:3]  # type: ignore[return-value]
        return (2, 2, 1)


def parse_topology(name: str) -> Target:
    """The machine of that name. Raises ConfigError that lists the known ones."""
    match = _TPU_NAME.fullmatch(name)
    if match is not None:
        chip = CHIPS[match["chip"]]
        grid = tuple(int(size) for size in match["grid"].split("x"))
        return _checked(Target(name=name, chip=chip, grid=grid))
    match = _CPU_NAME.fullmatch(name)
    if match is not None:
        count = int(match["count"] or 1)
        share = available_cpu_bytes() // max(count, 1)
        return _checked(Target(name=name, chip=cpu_chip(share), grid=(count,)))
    match = _GPU_NAME.fullmatch(name)
    chip = CHIPS.get(match["chip"]) if match is not None else None
    if match is not None and chip is not None and chip.platform == "gpu":
        count = int(match["count"] or 1)
        return _checked(Target(name=name, chip=chip, grid=(count,)))
    raise ConfigError(f"topology={name!r} is not known. {_known()}")


def _checked(target: Target) -> Target:
    """Raises ConfigError for a shape that no machine has."""
    chip, name = target.chip, target.name
    if not 1 <= target.num_devices <= _MOST_DEVICES:
        raise ConfigError(
            f"topology={name!r} has {target.num_devices} devices: give 1 to {_MOST_DEVICES}."
        )
    if chip.platform != "tpu":
        return target
    dimensions = _DIMENSIONS[chip.name]
    if len(target.grid) != dimensions:
        example = "2x2" if dimensions == 2 else "2x2x1"
        raise ConfigError(
            f"topology={name!r}: {chip.name} has grids of {dimensions} numbers, like "
            f"{chip.name}:{example}. {_known()}"
        )
    if math.prod(target.grid) >= _CHIPS_PER_HOST and any(size % 2 for size in target.grid[:2]):
        raise ConfigError(
            f"topology={name!r}: a host has 2x2 chips, so the first two numbers must be even "
            f"(or the grid has less than {_CHIPS_PER_HOST} chips). {_known()}"
        )
    return target


def _known() -> str:
    return f"Known are {', '.join(SUGGESTED)}; larger grids and other counts (h100x4) go as well."


def family(target: Target) -> tuple[Target, ...]:
    """The usual machines of the same chip, small to large; a CPU has none but itself."""
    chip = target.chip.name
    if target.chip.platform == "cpu":
        return (target,)
    if target.chip.platform == "gpu":
        names = [chip if count == 1 else f"{chip}x{count}" for count in _GPUS_OF_A_HOST]
    else:
        names = [f"{chip}:{grid}" for grid in _FAMILIES[chip]]
    return tuple(parse_topology(name) for name in names)
