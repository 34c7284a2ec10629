"""The device mesh. Every part of the engine sees devices through it; one device is a mesh of ones.

Axes: `data` (replicas and attention data parallelism), `pipe` (stages of layers), `expert`,
`tensor` (heads, hidden width and vocabulary of one layer).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jax.sharding import AxisType, Mesh

from jaxinfer.errors import ConfigError

AXES = ("data", "pipe", "expert", "tensor")


class Device(Protocol):
    """What the engine asks of a `jax.Device` (which type checkers do not accept as a type)."""

    @property
    def id(self) -> int: ...
    @property
    def client(self) -> Any: ...
    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...
    @property
    def num_cores(self) -> int: ...  # TPUs have it
    @property
    def core_count(self) -> int: ...  # GPUs have it, and the next
    @property
    def compute_capability(self) -> str: ...
    def memory_stats(self) -> dict[str, Any]: ...


def num_cores(device: Device) -> int:
    """Cores of a TPU device that run one program together; 1 elsewhere."""
    return device.num_cores if device.platform == "tpu" else 1


def make_mesh(*, tensor: int, devices: Sequence[Device]) -> Mesh:
    """A mesh over the first `tensor` devices.

    Raises ConfigError when there are fewer devices than asked for.
    """
    if tensor > len(devices):
        hint = ""
        if devices and devices[0].platform == "cpu":
            hint = f" (XLA_FLAGS=--xla_force_host_platform_device_count={tensor} shows more)"
        raise ConfigError(
            f"--tensor-parallel-size {tensor} needs {tensor} devices, but there are "
            f"{len(devices)}: use at most {len(devices)}{hint}."
        )
    grid = np.asarray(devices[:tensor]).reshape(1, 1, 1, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
