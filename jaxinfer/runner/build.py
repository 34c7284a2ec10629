"""Makes a Runner: resolve the settings, plan the memory, compile every shape, load the weights.

Knows the order and what each part needs of the others; the parts know nothing of each other.
"""

from dataclasses import replace
from typing import NamedTuple

import jax

from jaxinfer.config.env import cache_dir
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.progress import ProgressCallback
from jaxinfer.errors import CheckpointError
from jaxinfer.logging import get_logger, log_phase
from jaxinfer.models.base import ModelDef
from jaxinfer.models.registry import define_model
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.runner.abstract import (
    AbstractArrays,
    AbstractModel,
    abstract_arrays,
    allocate,
    make_abstract,
)
from jaxinfer.runner.compiler import CompileCounter, enable_persistent_cache
from jaxinfer.runner.memory import MemoryPlan, plan_memory, with_measured_temp
from jaxinfer.runner.programs import compile_programs
from jaxinfer.runner.runner import Programs, Runner, Vocabulary
from jaxinfer.runner.sizing import make_limits, memory_needs, platform_of, resolve_config
from jaxinfer.tokenizer.tokenizer import load_tokenizer
from jaxinfer.weights.dummy import dummy_params
from jaxinfer.weights.hub import locate_model, locate_tokenizer
from jaxinfer.weights.loader import check_fit, load_params
from jaxinfer.weights.reader import CheckpointReader, open_checkpoint
from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.native.library import load_native_kernels

logger = get_logger(__name__)


class _Plan(NamedTuple):
    """Programs, and the numbers and shapes that they were compiled for."""

    memory: MemoryPlan
    limits: EngineLimits
    arrays: AbstractArrays
    programs: Programs


def build_runner(config: EngineConfig, progress: ProgressCallback) -> Runner:
    """Loads and compiles; returns when every shape a step can have is ready.

    Raises UserError for what the user can repair, CapacityError when the model does not fit.
    """
    location = locate_model(config.model, progress)
    reader = open_checkpoint(location.path, config.model.load_format)
    try:
        return _build(config, reader, progress)
    finally:
        reader.close()


def _build(config: EngineConfig, reader: CheckpointReader, progress: ProgressCallback) -> Runner:
    counter = CompileCounter()
    devices = jax.devices()
    definition = define_model(reader.config(), tensor=config.parallel.tensor_parallel_size)
    config = resolve_config(config, definition, devices)
    enable_persistent_cache(config.compile.compile_cache)
    mesh = make_mesh(tensor=config.parallel.tensor_parallel_size, devices=devices)
    kernels = _choose_kernels(config, definition, platform=platform_of(devices[0]))
    model = make_abstract(definition, mesh, kernels, dtype=config.model.dtype)
    _check_weights(config, model, reader)
    with log_phase(logger, "compile"):
        plan = _plan_and_compile(config, model, progress)
    logger.info("memory of each device:\n%s", plan.memory.table())
    with log_phase(logger, "load weights"):
        weights = _load(config, model, reader, progress)
    progress("allocate", 0, 0)
    ends = _eos_token_ids(config, reader, progress)
    arrays = allocate(model, plan.limits, plan.arrays, weights)
    jax.block_until_ready(arrays)
    counter.mark_ready()
    return Runner(
        config=config,
        limits=plan.limits,
        memory=plan.memory,
        mesh=mesh,
        programs=plan.programs,
        arrays=arrays,
        vocabulary=Vocabulary(definition.shape.vocab_size, ends),
        counter=counter,
    )


def _choose_kernels(config: EngineConfig, definition: ModelDef, *, platform: str) -> KernelSet:
    native = None
    if platform == "cpu" and config.compile.native_kernels:
        with log_phase(logger, "prepare C++ kernels"):
            native = load_native_kernels(cache_dir() / "native", head_dim=definition.shape.head_dim)
    kernels = choose_kernels(platform=platform, native=native)
    for reason in kernels.reasons:
        logger.info("kernel %s", reason)
    return kernels


def _plan_and_compile(
    config: EngineConfig, model: AbstractModel, progress: ProgressCallback
) -> _Plan:
    """Divides the memory by a guess at the step's temporaries, compiles, and checks the guess.

    The number of pages is part of every shape. Should XLA need more than was guessed, the plan is
    made again from its figure, with fewer pages or a CapacityError, and compiled again.
    """
    needs = memory_needs(config, model)
    while True:
        memory = plan_memory(needs, config.cache)
        limits = make_limits(config, memory)
        arrays = abstract_arrays(model, limits, kv_cache_dtype=config.cache.kv_cache_dtype)
        programs, temp_bytes = compile_programs(
            config, model, limits, arrays, lambda done, total: progress("compile", done, total)
        )
        measured = with_measured_temp(memory, temp_bytes)
        if measured.fits:
            return _Plan(measured, limits, arrays, programs)
        assert temp_bytes > needs.temp_bytes, "the plan was within the memory"
        logger.warning(
            "the largest step needs %d bytes of temporaries, not %d as was guessed: planning and "
            "compiling again",
            temp_bytes,
            needs.temp_bytes,
        )
        needs = replace(needs, temp_bytes=temp_bytes)


def _check_weights(config: EngineConfig, model: AbstractModel, reader: CheckpointReader) -> None:
    """Raises CheckpointError for tensors that do not fit the model, before anything long."""
    if config.model.load_format != "dummy":
        definition = model.definition
        check_fit(reader, model.params, definition.pieces, optional_names=definition.is_optional)


def _eos_token_ids(
    config: EngineConfig, reader: CheckpointReader, progress: ProgressCallback
) -> tuple[int, ...]:
    """What ends a generation: the tokenizer knows; without one, what the configs say."""
    path = locate_tokenizer(config.model, progress) or reader.path
    try:
        return load_tokenizer(path).eos_token_ids
    except CheckpointError as error:
        logger.info("no tokenizer (%s): end tokens are those of config.json", error)
    ids = reader.generation_config().get("eos_token_id", reader.config().get("eos_token_id"))
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _load(
    config: EngineConfig,
    model: AbstractModel,
    reader: CheckpointReader,
    progress: ProgressCallback,
) -> tuple[jax.Array, ...]:
    definition = model.definition
    if config.model.load_format == "dummy":
        params = dummy_params(model.params, config.model.seed, pieces=definition.pieces)
    else:
        params = load_params(
            reader,
            model.params,
            definition.pieces,
            optional_names=definition.is_optional,
            on_progress=progress,
        )
    return tuple(params[path] for path in model.params)
