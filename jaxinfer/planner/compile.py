"""Lays an engine out on devices that are not here, compiles its real steps, reads what XLA says.

Interface, all of it data in and data out:

    target = parse_topology("v6e:2x4")                     # topologies.py
    devices = target_devices(target)                       # devices.py; needs the compiler
    layout = lay_out(config_json, engine_config, target, devices)
    engine = divide_memory(layout)                         # CapacityError when it does not fit
    step = compile_step(engine, Bucket(...))               # step.facts, step.hlo, step.compiled
    buckets = engine_buckets(engine.config, engine.model, engine.limits)   # runner/programs.py

`config_json` is a model's config.json as a dict; settings (`--max-num-seqs`,
`--num-gpu-blocks-override`, ...) are those of EngineConfig. `lay_out` and `divide_memory` compile
nothing and also work on `devices.stand_ins(target.num_devices)`. The engine's own modules do the
work (runner/abstract.py, sizing.py, memory.py, programs.py); this one only puts other devices
under them. Threads may compile side by side.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.stages import Compiled

from jaxinfer.config.resolve import DeviceFacts
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.models.base import ModelDef
from jaxinfer.models.registry import define_model
from jaxinfer.parallel.mesh import Device, make_mesh
from jaxinfer.planner.hlo import Collective, collectives_of
from jaxinfer.planner.topologies import Target
from jaxinfer.planner.traffic import traffic_of
from jaxinfer.runner.abstract import AbstractArrays, AbstractModel, abstract_arrays, make_abstract
from jaxinfer.runner.buckets import Bucket
from jaxinfer.runner.compiler import (
    CompilerOptions,
    Program,
    compile_lowered,
    compiler_options,
)
from jaxinfer.runner.kernels import choose_engine_kernels, gpu_request, refuse_another
from jaxinfer.runner.memory import MemoryNeeds, MemoryPlan, plan_memory
from jaxinfer.runner.programs import step_program
from jaxinfer.runner.sizing import attention_shape, make_limits, memory_needs_on, resolve_for
from jaxinfer.runner.step_fn import DeviceState, StepModel, prepare_inputs
from pallas_kernels.devices import TPUS
from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.paged_attention.gpu_choice import GpuSpec

NO_OPTIONS: CompilerOptions = MappingProxyType({})


KnownModels = dict[tuple[int, str, str], AbstractModel]
"""By devices that share a layer, type, and type of the cache."""


class Layout(NamedTuple):
    """A model on a machine, before its memory is divided."""

    target: Target
    config: EngineConfig  # resolved
    model: AbstractModel
    needs: MemoryNeeds  # the temporaries are a guess


class TargetEngine(NamedTuple):
    """An engine on a machine, as far as it can be known without the machine."""

    target: Target
    config: EngineConfig  # resolved
    model: AbstractModel
    memory: MemoryPlan
    limits: EngineLimits
    arrays: AbstractArrays


@dataclass(frozen=True, kw_only=True)
class ProgramFacts:
    """What a compiled program says of itself; bytes and operations are those of one device."""

    num_args: int
    argument_bytes: int  # as the compiler lays arrays out, which may pad them
    output_bytes: int
    alias_bytes: int  # of the outputs, what takes the place of inputs
    temp_bytes: int
    code_bytes: int
    moved_bytes: int  # see traffic.py; without pages
    flops: float  # 0 where it is not known: CUDA's compiler does not say
    collectives: tuple[Collective, ...]
    trace_s: float
    compile_s: float


class CompiledStep(NamedTuple):
    """A step, compiled for the machine."""

    bucket: Bucket
    facts: ProgramFacts
    hlo: str  # the optimized program's text
    compiled: Compiled


def lay_out(
    config_json: Mapping[str, Any],
    config: EngineConfig,
    target: Target,
    devices: Sequence[Device],
    *,
    known: KnownModels | None = None,
) -> Layout:
    """Resolves the settings for the machine and lays the model out on `devices`.

    `known` remembers shapes from call to call, of one model on the same devices. Raises ConfigError
    and CheckpointError, as a start on the machine would.
    """
    tensor = config.parallel.tensor_parallel_size
    definition = define_model(config_json, tensor=tensor)
    chip = target.chip
    config = resolve_for(
        config,
        definition,
        DeviceFacts(
            platform=chip.platform,
            device_kind=chip.device_kind,
            num_devices=target.num_devices,
            memory_bytes=chip.usable_bytes,
        ),
    )
    mesh = make_mesh(tensor=tensor, devices=devices)
    kernels = _kernels(config, definition, target, devices[0])
    known = {} if known is None else known
    key = (tensor, config.model.dtype, config.cache.kv_cache_dtype)
    if key not in known:
        known[key] = make_abstract(
            definition,
            mesh,
            kernels,
            dtype=config.model.dtype,
            kv_cache_dtype=config.cache.kv_cache_dtype,
        )
    model = known[key]._replace(kernels=kernels)
    needs = memory_needs_on(chip.platform, chip.usable_bytes, config, model)
    return Layout(target, config, model, needs)


def divide_memory(layout: Layout) -> TargetEngine:
    """Makes pages of what weights, state and the guess at temporaries leave.

    Raises CapacityError when one sequence does not fit. For XLA's figure instead of the guess:
    `layout._replace(needs=replace(layout.needs, temp_bytes=...))`.
    """
    config, model = layout.config, layout.model
    memory = plan_memory(layout.needs, config.cache)
    limits = make_limits(config, memory)
    arrays = abstract_arrays(model, limits, kv_cache_dtype=config.cache.kv_cache_dtype)
    return TargetEngine(layout.target, config, model, memory, limits, arrays)


def _kernels(
    config: EngineConfig, definition: ModelDef, target: Target, device: Device
) -> KernelSet:
    """Those that the engine would choose on the machine, if a GPU passes their check there.

    Raises ConfigError for an attention backend that a start there would refuse.
    """
    chip, shape = target.chip, attention_shape(config, definition)
    if chip.platform == "cpu":
        return choose_engine_kernels(config, definition, device)
    if chip.platform == "tpu":
        kernels = choose_kernels(
            platform="tpu",
            device_kind=chip.device_kind,
            num_cores=TPUS[chip.device_kind].num_cores,
            attention_shape=shape,
            attention_backend=config.compile.attention_backend,
        )
        refuse_another(config, kernels)
        return kernels
    assert chip.gpu is not None
    gpu = GpuSpec(compute_capability=chip.gpu.compute_capability, num_cores=chip.gpu.num_cores)
    return choose_kernels(platform="gpu", gpu=gpu_request(config, definition, gpu))


def compile_step(
    engine: TargetEngine,
    bucket: Bucket,
    *,
    options: CompilerOptions = NO_OPTIONS,
    layers_only: bool = False,
) -> CompiledStep:
    """Compiles the step of a bucket for the engine's devices.

    `options` are XLA's, besides those that the engine gives. `layers_only` ends the program at the
    hidden states: all that depends on how many layers there are, without output head and sampler,
    which take a compiler most of its time.
    """
    model = engine.model.step_model(engine.limits)
    program = step_program(model, bucket, engine.arrays, engine.limits)
    if layers_only:
        program = _layers_of(model, bucket, program)
    compiled, trace_s, compile_s = _compile(engine, program, options)
    text = compiled.as_text() or ""
    # (Of a GPU somewhat too much: a plan does not count on its cache.)
    moved_bytes = traffic_of(text, pages=page_shape(engine)).num_bytes
    facts = read_facts(
        compiled, text, moved_bytes=moved_bytes, trace_s=trace_s, compile_s=compile_s
    )
    return CompiledStep(bucket, facts, text, compiled)


def _layers_of(model: StepModel, bucket: Bucket, step: Program) -> Program:
    """The step's beginning, with its arguments; those that nothing reads are dropped."""

    def layers(
        weights: tuple[jax.Array, ...],
        pages_L: tuple[jax.Array, ...],
        state: DeviceState,
        words: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        prepared = prepare_inputs(model, bucket, state, words)
        return model.bind(weights)(prepared.token_ids_T, pages_L, prepared.batch)

    return Program(function=layers, args=step.args, donate=(1,))


def page_shape(engine: TargetEngine) -> tuple[int, ...]:
    """Of a layer's pages on one device."""
    pages = engine.arrays.pages_L[0]
    assert pages.sharding is not None
    return pages.sharding.shard_shape(pages.shape)


def _compile(
    engine: TargetEngine, program: Program, options: CompilerOptions
) -> tuple[Compiled, float, float]:
    start_s = time.perf_counter()
    config = engine.config.compile
    assert config.num_compile_workers is not None, "it is resolved"
    # A Pallas kernel asks the mesh that is set, not its arguments, for what it is lowered for.
    with jax.set_mesh(engine.model.mesh):
        lowered = jax.jit(program.function, donate_argnums=program.donate).lower(*program.args)
        traced_s = time.perf_counter()
        own = compiler_options(config.device, num_workers=config.num_compile_workers)
        compiled = compile_lowered(lowered, {**own, **options})
    return compiled, traced_s - start_s, time.perf_counter() - traced_s


def read_facts(
    compiled: Compiled, text: str, *, moved_bytes: int, trace_s: float, compile_s: float
) -> ProgramFacts:
    """What XLA knows of a program; `text` is its `as_text()`."""
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None, "all compilers of targets have it"
    return ProgramFacts(
        num_args=len(jax.tree.leaves(compiled.in_avals)),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        moved_bytes=moved_bytes,
        flops=costs.get("flops", 0.0),
        collectives=collectives_of(text),
        trace_s=trace_s,
        compile_s=compile_s,
    )
