"""Checks one set of settings on one machine: by arithmetic, then by compiling.

The one way in which the planner asks whether something fits; alternatives go through it like what
the user gave. Memory is divided by the engine's own code (runner/memory.py).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import CapacityError, ConfigError, JaxInferError, UserError
from jaxinfer.logging import get_logger
from jaxinfer.planner.compile import KnownModels, Layout, TargetEngine, divide_memory, lay_out
from jaxinfer.planner.devices import stand_ins, target_devices
from jaxinfer.planner.messages import ProgramRow
from jaxinfer.planner.steps import compile_rows
from jaxinfer.planner.topologies import Target
from jaxinfer.runner.memory import MemoryPlan, draft_memory, with_measured_temp
from jaxinfer.runner.programs import engine_buckets

logger = get_logger(__name__)

_OUT_OF_HBM = re.compile(r"RESOURCE_EXHAUSTED.*out of memory (on|in memory space) hbm\b", re.I)
_GIB = 2**30


class NotCompiledError(JaxInferError):
    """The compiler failed for a reason that says nothing of the device's memory."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """An answer. `engine` is None when it does not fit; `why_not` says why. Bytes of a device."""

    target: Target
    layout: Layout
    memory: MemoryPlan  # also where it does not fit
    engine: TargetEngine | None
    why_not: str
    programs: tuple[ProgramRow, ...] = ()  # largest decode and mixed steps; empty: not compiled
    code_bytes: int = 0  # of all programs, estimated from those; 0: the compiler does not say
    padding_bytes: int = 0  # what the compiler adds to weights, state and pages

    @property
    def cache_tokens(self) -> int:
        """Tokens that the pages hold."""
        return self.memory.num_pages * self.memory.page_size

    @property
    def needed_bytes(self) -> int:
        """All that lies on the device while the largest step runs; with XLA's figures only."""
        temp_bytes = max(row.temp_bytes for row in self.programs)
        total_bytes = with_measured_temp(self.memory, temp_bytes).total_bytes
        return total_bytes + self.code_bytes + self.padding_bytes

    @property
    def utilization_that_fits(self) -> float | None:
        """--gpu-memory-utilization that leaves room for the programs; None: others say how many
        pages there are, or nothing is short."""
        cache, short = self.layout.config.cache, self.needed_bytes - self.memory.device_bytes
        if cache.num_gpu_blocks_override or cache.kv_cache_memory_bytes or short <= 0:
            return None
        least = math.floor(100 * (self.memory.total_bytes - short) / self.memory.device_bytes)
        return least / 100 if least > 0 else None


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
        return _divide(lay_out(self._config_json, config, target, devices, known=self._known))

    def arithmetic_or_none(self, config: EngineConfig, target: Target) -> Checked | None:
        """None where the settings do not go together."""
        try:
            return self.arithmetic(config, target)
        except UserError as error:
            logger.debug("passed over: %s", error)
            return None

    def compiled(self, checked: Checked) -> Checked:
        """With XLA's figures; `checked` fits.

        Raises MissingCompilerError, and NotCompiledError where the compiler fails otherwise than
        for want of memory.
        """
        assert checked.engine is not None
        devices = target_devices(checked.target)
        layout = lay_out(self._config_json, checked.layout.config, checked.target, devices)
        engine = divide_memory(layout)
        try:
            rows = compile_rows(self._config_json, engine, devices, num_workers=self._num_workers)
        except UserError:
            raise
        except Exception as error:  # a compiler raises whatever it likes
            if is_out_of_memory(error):
                why_not = f"The compiler finds no room: {_first_line(error)}"
                return replace(checked, engine=None, why_not=why_not)
            logger.debug("the compiler failed", exc_info=True)
            raise NotCompiledError(f"{type(error).__name__}: {_first_line(error)}") from error
        temp_bytes = max(row.temp_bytes for row in rows)
        if temp_bytes > layout.needs.temp_bytes:  # the engine would plan again, see runner/build.py
            layout = layout._replace(needs=replace(layout.needs, temp_bytes=temp_bytes))
        return _with_programs(_divide(layout), engine, rows)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a compiler says that a program is too large for the device's memory.

    RESOURCE_EXHAUSTED alone does not: a kernel that is too large for VMEM ends in it as well.
    """
    is_of_compiler = isinstance(error, jax.errors.JaxRuntimeError)
    return is_of_compiler and _OUT_OF_HBM.search(str(error)) is not None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _divide(layout: Layout) -> Checked:
    engine, why_not = None, ""
    try:
        engine = divide_memory(layout)
        if not engine.memory.fits:
            engine, why_not = None, f"Not enough memory:\n{engine.memory.table()}"
    except CapacityError as error:
        why_not = str(error)
    memory = draft_memory(layout.needs, layout.config.cache)
    return Checked(
        target=layout.target, layout=layout, memory=memory, engine=engine, why_not=why_not
    )


def _with_programs(checked: Checked, engine: TargetEngine, rows: Sequence[ProgramRow]) -> Checked:
    """The answer with programs that were compiled for `engine`, which lie on the device as well.

    Nothing keeps memory for them but what --gpu-memory-utilization leaves.
    """
    planned = engine.memory
    known_bytes = planned.weight_bytes + planned.state_bytes + planned.kv_bytes
    checked = replace(
        checked,
        programs=tuple(rows),
        code_bytes=_code_bytes(engine, rows),
        padding_bytes=max(max(row.argument_bytes for row in rows) - known_bytes, 0),
    )
    if checked.engine is None or checked.needed_bytes <= checked.memory.device_bytes:
        return checked
    return replace(checked, engine=None, why_not=_no_room_for_programs(checked))


def _code_bytes(engine: TargetEngine, rows: Sequence[ProgramRow]) -> int:
    """All programs': each kind is counted as large as its largest, which was compiled."""
    buckets = engine_buckets(engine.config, engine.model, engine.limits)
    decode, mixed = rows
    num_decode = sum(bucket.decode_only for bucket in buckets)
    return num_decode * decode.code_bytes + (len(buckets) - num_decode) * mixed.code_bytes


def _no_room_for_programs(checked: Checked) -> str:
    utilization = checked.utilization_that_fits
    repair = (
        "Give the cache fewer pages (--num-gpu-blocks-override, --kv-cache-memory-bytes)"
        if utilization is None
        else f"Leave more beside the cache: --gpu-memory-utilization {utilization:.2f}"
    )
    return (
        f"Not enough memory for the programs themselves:\n{checked.memory.table()}\n"
        f"With {checked.code_bytes / _GIB:.2f} GiB of programs and "
        f"{checked.padding_bytes / _GIB:.2f} GiB of padding {checked.needed_bytes / _GIB:.2f} GiB "
        f"are needed of the {checked.memory.device_bytes / _GIB:.2f} GiB of the device. {repair}."
    )
