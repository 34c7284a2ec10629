"""Fills a compile cache ahead of time, to be shipped with an image or kept in a bucket.

For "cpu" the engine itself starts once, here, with the cache in `directory`: what it leaves is what
a later start reads. For a TPU or GPU that is not here the engine's programs are compiled for its
topology and stored under the names that a start on it would look for; the number of pages is fixed
then, since it is part of every shape. Whether the machine accepts them can only be seen on it.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.logging import get_logger, log_phase
from jaxinfer.planner.check import check_divides
from jaxinfer.planner.compile import Layout, divide_memory, lay_out
from jaxinfer.planner.devices import target_devices
from jaxinfer.planner.messages import BuildRequest, BuildResult
from jaxinfer.planner.plan import read_config
from jaxinfer.planner.topologies import Target, parse_topology
from jaxinfer.runner.build import build_runner, store_facts
from jaxinfer.runner.compiler import enable_persistent_cache
from jaxinfer.runner.memory import with_measured_temp
from jaxinfer.runner.program_store import check_stored, open_store
from jaxinfer.runner.programs import compile_programs

logger = get_logger(__name__)

_UNPROVEN = (
    "Compiled without the hardware. Not proven: that its driver reports the same version and "
    "device ids, which are part of a program's name, and that it loads these programs. The log of "
    "the first start tells: 'read' is a program that was found, 'compiled' one that was not."
)


def build_cache(request: BuildRequest) -> BuildResult:
    """Raises ConfigError, CheckpointError, CapacityError and MissingCompilerError."""
    start_s = time.monotonic()
    target = parse_topology(request.topology)
    check_divides(request.engine, target)
    directory = Path(request.directory).absolute()
    config = _with_cache(request.engine, directory)
    if target.chip.platform == "cpu":
        built = _start_once(config, target)
    else:
        built = _compile_ahead(Path(request.config_path), config, target)
    return BuildResult(
        topology=target.name,
        directory=str(directory),
        num_programs=built.num_programs,
        num_bytes=sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()),
        serve_flags=f"--compile-cache {directory} {built.flags}".strip(),
        notes=[built.note],
        wall_s=time.monotonic() - start_s,
    )


class _Built(NamedTuple):
    num_programs: int
    flags: str  # that serve must be given besides those that build was given
    note: str


def _with_cache(config: EngineConfig, directory: Path) -> EngineConfig:
    compiling = replace(config.compile, compile_cache=str(directory))
    return replace(config, compile=compiling)


def _start_once(config: EngineConfig, target: Target) -> _Built:
    if target.num_devices > 1:
        raise ConfigError(
            f"topology={target.name!r}: programs are built for the processor of this machine, "
            "which is one device. Give cpu."
        )
    runner = build_runner(config, _log_progress, must_store=True)
    num_programs, num_pages = len(runner.buckets) + 2, runner.limits.num_pages
    runner.close()
    note = (
        "A start finds these programs on machines with this processor, this software and as many "
        f"pages. Where less memory is free, build and serve with --num-gpu-blocks-override "
        f"{num_pages}."
    )
    return _Built(num_programs, "", note)


def _compile_ahead(config_path: Path, config: EngineConfig, target: Target) -> _Built:
    """With as many pages as a start would make: if XLA needs more for the largest step than they
    leave, there are fewer, and all is compiled again."""
    config_json = read_config(config_path)
    devices = target_devices(target)
    layout = lay_out(config_json, config, target, devices)
    enable_persistent_cache(config.compile.compile_cache)
    with jax.set_mesh(layout.model.mesh):  # in all threads; see compile.py
        while True:
            num_pages = divide_memory(layout).limits.num_pages
            # Settings are part of a program's name: those that the machine will be given are used.
            cache = replace(config.cache, num_gpu_blocks_override=num_pages)
            fixed = lay_out(config_json, replace(config, cache=cache), target, devices)
            num_programs, temp_bytes = _compile_fixed(config_json, fixed)
            if with_measured_temp(divide_memory(fixed).memory, temp_bytes).fits:
                flags = f"--num-gpu-blocks-override {num_pages}"
                return _Built(num_programs, flags, _UNPROVEN)
            logger.warning(
                "the largest step needs %d bytes of temporaries, not %d as was guessed: with fewer "
                "pages than %d everything is compiled again",
                temp_bytes,
                layout.needs.temp_bytes,
                num_pages,
            )
            layout = layout._replace(needs=replace(layout.needs, temp_bytes=temp_bytes))


def _compile_fixed(config_json: dict[str, Any], layout: Layout) -> tuple[int, int]:
    """Stores the programs of a layout whose settings say how many pages there are.

    Returns their number, and the temporaries of the largest step in bytes of a device.
    """
    config, model = layout.config, layout.model
    directory = config.compile.compile_cache
    facts = store_facts(config, model.kernels, config_json)
    store = open_store(directory, tuple(model.mesh.devices.flat), facts, reads=False)
    check_stored(store, directory)  # that none can be is said at once
    engine = divide_memory(layout)
    with log_phase(logger, "compile") as phase:

        def tell(names: str) -> None:
            phase.detail = names

        compiled = compile_programs(
            config,
            model,
            engine.limits,
            engine.arrays,
            store,
            lambda done, total: _log_progress("compile", done, total),
            tell,
        )
    check_stored(store, directory)
    return len(compiled.programs.steps) + 2, compiled.temp_bytes


def _log_progress(phase: str, done: int, total: int) -> None:
    if total:
        logger.info("%s: %d of %d", phase, done, total)
