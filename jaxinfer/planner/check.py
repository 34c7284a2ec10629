"""Checks one set of settings on one machine: by arithmetic, then by compiling.

The one way in which the planner asks whether something fits; alternatives go through it like what
the user gave. Memory is divided by the engine's own code (runner/memory.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import CapacityError, ConfigError, UserError
from jaxinfer.logging import get_logger
from jaxinfer.planner.compile import KnownModels, Layout, TargetEngine, divide_memory, lay_out
from jaxinfer.planner.devices import stand_ins, target_devices
from jaxinfer.planner.messages import ProgramRow
from jaxinfer.planner.steps import compile_rows
from jaxinfer.planner.topologies import Target

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """An answer. `engine` is None when it does not fit; `why_not` says why."""

    target: Target
    layout: Layout
    engine: TargetEngine | None
    why_not: str
    programs: tuple[ProgramRow, ...]  # the largest decode and mixed steps; empty: not compiled

    @property
    def cache_tokens(self) -> int:
        """Tokens that the pages hold."""
        assert self.engine is not None
        return self.engine.limits.num_pages * self.engine.limits.page_size


def check_divides(config: EngineConfig, target: Target) -> None:
    """Raises ConfigError for a TP that the machine has not, or that leaves devices over."""
    tensor, devices = config.parallel.tensor_parallel_size, target.num_devices
    if devices % tensor:
        good = [str(size) for size in range(1, devices + 1) if devices % size == 0]
        raise ConfigError(
            f"tensor_parallel_size={tensor} does not divide the {devices} devices of topology="
            f"{target.name!r}: give one of {', '.join(good)}, or another topology."
        )


class Checker:
    """Of one model."""

    def __init__(self, config_json: Mapping[str, Any], *, num_workers: int) -> None:
        """`num_workers` programs are compiled at a time."""
        self._config_json = config_json
        self._num_workers = num_workers
        self._known: KnownModels = {}  # tracing a large model takes a second

    def arithmetic(self, config: EngineConfig, target: Target) -> Checked:
        """With an estimate of the temporaries. Raises what a start on the machine would raise
        before it looks at the memory."""
        check_divides(config, target)
        devices = stand_ins(config.parallel.tensor_parallel_size)
        layout = lay_out(self._config_json, config, target, devices, known=self._known)
        return _divide(layout, programs=())

    def arithmetic_or_none(self, config: EngineConfig, target: Target) -> Checked | None:
        """None where the settings do not go together."""
        try:
            return self.arithmetic(config, target)
        except UserError as error:
            logger.debug("passed over: %s", error)
            return None

    def compiled(self, checked: Checked) -> Checked:
        """With XLA's figures. Raises MissingCompilerError; `checked` fits."""
        assert checked.engine is not None
        devices = target_devices(checked.target)
        layout = lay_out(self._config_json, checked.layout.config, checked.target, devices)
        engine = divide_memory(layout)
        try:
            rows = tuple(
                compile_rows(self._config_json, engine, devices, num_workers=self._num_workers)
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            why_not = f"The compiler finds no room: {str(error).splitlines()[0]}"
            return replace(checked, engine=None, why_not=why_not)
        temp_bytes = max(row.temp_bytes for row in rows)
        if temp_bytes > layout.needs.temp_bytes:  # the engine would plan again, see runner/build.py
            layout = layout._replace(needs=replace(layout.needs, temp_bytes=temp_bytes))
        return _divide(layout, programs=rows)


def _divide(layout: Layout, *, programs: tuple[ProgramRow, ...]) -> Checked:
    engine, why_not = None, ""
    try:
        engine = divide_memory(layout)
        if not engine.memory.fits:
            engine, why_not = None, f"Not enough memory:\n{engine.memory.table()}"
    except CapacityError as error:
        why_not = str(error)
    return Checked(
        target=layout.target, layout=layout, engine=engine, why_not=why_not, programs=programs
    )
