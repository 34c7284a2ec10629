"""Makes a Runner: resolve the settings, plan the memory, compile every shape, load the weights.

Knows the order and what each part needs of the others; the parts know nothing of each other.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxinfer.config.env import reserve_gpu_memory
from jaxinfer.config.schema import CompileConfig, EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.progress import ProgressCallback
from jaxinfer.errors import CheckpointError
from jaxinfer.logging import Phase, get_logger, log_phase
from jaxinfer.models.registry import define_model
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.runner.abstract import (
    AbstractArrays,
    AbstractModel,
    abstract_arrays,
    make_abstract,
    make_allocator,
)
from jaxinfer.runner.compiler import CompileCounter, enable_persistent_cache
from jaxinfer.runner.kernels import choose_engine_kernels
from jaxinfer.runner.kv_scales import make_kv_scales
from jaxinfer.runner.memory import (
    GPU_MEMORY_FRACTION,
    MemoryNeeds,
    MemoryPlan,
    plan_memory,
    with_measured_temp,
)
from jaxinfer.runner.program_store import ProgramStore, check_stored, open_store
from jaxinfer.runner.programs import compile_programs
from jaxinfer.runner.runner import DeviceArrays, DeviceMemory, Programs, Runner, Vocabulary
from jaxinfer.runner.sizing import make_limits, memory_needs, resolve_config
from jaxinfer.runner.warm_up import warm_up
from jaxinfer.tokenizer.tokenizer import load_tokenizer
from jaxinfer.weights.dummy import dummy_params
from jaxinfer.weights.hub import locate_model, locate_tokenizer
from jaxinfer.weights.loader import check_fit, load_params
from jaxinfer.weights.reader import CheckpointReader, open_checkpoint
from pallas_kernels.dispatch import KernelSet

logger = get_logger(__name__)


class CompiledPlan(NamedTuple):
    """Programs, and the numbers and shapes that they were compiled for."""

    memory: MemoryPlan
    limits: EngineLimits
    arrays: AbstractArrays
    programs: Programs


def build_runner(
    config: EngineConfig, progress: ProgressCallback, *, must_store: bool = False
) -> Runner:
    """Loads and compiles; returns when every shape a step can have is ready.

    Raises UserError for what the user can repair, CapacityError when the model does not fit. With
    `must_store` that a program cannot be stored is an error too, not a line in the log.
    """
    reserve_gpu_memory(GPU_MEMORY_FRACTION)
    location = locate_model(config.model, progress)
    reader = open_checkpoint(location.path, config.model.load_format)
    try:
        return _build(config, reader, progress, must_store=must_store)
    finally:
        reader.close()


def _build(
    config: EngineConfig, reader: CheckpointReader, progress: ProgressCallback, *, must_store: bool
) -> Runner:
    counter = CompileCounter()
    devices = jax.devices()
    definition = define_model(reader.config(), tensor=config.parallel.tensor_parallel_size)
    config = resolve_config(config, definition, devices)
    enable_persistent_cache(config.compile.compile_cache)
    mesh = make_mesh(tensor=config.parallel.tensor_parallel_size, devices=devices)
    kernels = choose_engine_kernels(config, definition, devices[0])
    model = make_abstract(
        definition,
        mesh,
        kernels,
        dtype=config.model.dtype,
        kv_cache_dtype=config.cache.kv_cache_dtype,
    )
    _check_weights(config, model, reader)
    store = _open_store(config, mesh, kernels, reader)
    if must_store:
        check_stored(store, config.compile.compile_cache)  # that none can be is said at once
    with log_phase(logger, "compile") as phase:
        needs = memory_needs(config, model)
        plan = plan_and_compile(config, model, needs, store, progress, phase)
    if must_store:
        check_stored(store, config.compile.compile_cache)
    logger.info("memory of each device:\n%s", plan.memory.table())
    with log_phase(logger, "load weights"):
        params = _load(config, model, reader, progress)
        params |= make_kv_scales(config, model, reader, params, store)
        weights = tuple(params[path] for path in model.params)
    with log_phase(logger, "allocate"):
        progress("allocate", 0, 0)
        allocate = make_allocator(model, plan.limits, plan.arrays)
        memory = allocate()
        jax.block_until_ready((weights, memory))
    with log_phase(logger, "read end tokens"):
        ends = _eos_token_ids(config, reader, progress)
    vocabulary = Vocabulary(definition.shape.vocab_size, ends)
    memory = _warm_up(plan, weights, memory, vocab_size=vocabulary.size, progress=progress)
    counter.mark_ready()
    return Runner(
        config=config,
        limits=plan.limits,
        memory=plan.memory,
        mesh=mesh,
        programs=plan.programs,
        arrays=DeviceArrays(weights, memory, allocate),
        vocabulary=vocabulary,
        counter=counter,
    )


def _warm_up(
    plan: CompiledPlan,
    weights: tuple[jax.Array, ...],
    memory: DeviceMemory,
    *,
    vocab_size: int,
    progress: ProgressCallback,
) -> DeviceMemory:
    """Runs each program once; see warm_up.py."""
    with log_phase(logger, "warm up") as phase:

        def on_program(name: str, done: int, total: int) -> None:
            phase.detail = name
            progress("warm up", done, total)

        return warm_up(
            plan.programs,
            weights,
            memory,
            plan.limits,
            vocab_size=vocab_size,
            on_program=on_program,
        )


def _open_store(
    config: EngineConfig, mesh: Mesh, kernels: KernelSet, reader: CheckpointReader
) -> ProgramStore | None:
    facts = store_facts(config, kernels, reader.config())
    return open_store(config.compile.compile_cache, tuple(mesh.devices.flat), facts)


def store_facts(
    config: EngineConfig, kernels: KernelSet, model_config: dict[str, Any]
) -> dict[str, Any]:
    """What an engine's programs are made from. Settings count, whatever they are: one too few
    would run a wrong program.

    But not where the model lies, nor those of compilation, which the programs and kernels show.
    """
    anywhere = replace(config.model, model="", tokenizer=None, revision=None, download_dir=None)
    return {
        "model": model_config,
        "settings": replace(config, model=anywhere, compile=CompileConfig()),
        "kernels": kernels.reasons,
    }


def plan_and_compile(
    config: EngineConfig,
    model: AbstractModel,
    needs: MemoryNeeds,
    store: ProgramStore | None,
    progress: ProgressCallback,
    phase: Phase,
) -> CompiledPlan:
    """Divides the memory by a guess at the step's temporaries, compiles, and checks the guess.

    The number of pages is part of every shape. Should XLA need more than was guessed, the plan is
    made again from its figure, with fewer pages or a CapacityError, and compiled again.
    """

    def tell(names: str) -> None:
        phase.detail = names

    while True:
        memory = plan_memory(needs, config.cache)
        limits = make_limits(config, memory)
        arrays = abstract_arrays(model, limits, kv_cache_dtype=config.cache.kv_cache_dtype)
        programs, temp_bytes = compile_programs(
            config,
            model,
            limits,
            arrays,
            store,
            lambda done, total: progress("compile", done, total),
            tell,
        )
        measured = with_measured_temp(memory, temp_bytes)
        if measured.fits:
            return CompiledPlan(measured, limits, arrays, programs)
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
        check_fit(
            reader,
            model.checkpoint_params,
            definition.pieces,
            optional_names=definition.is_optional,
        )


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
) -> dict[str, jax.Array]:
    definition = model.definition
    if config.model.load_format == "dummy":
        return dummy_params(
            model.checkpoint_params,
            config.model.seed,
            pieces=definition.pieces,
            packings=model.packings,
        )
    return load_params(
        reader,
        model.checkpoint_params,
        definition.pieces,
        packings=model.packings,
        optional_names=definition.is_optional,
        on_progress=progress,
    )
