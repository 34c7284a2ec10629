"""Makes a Runner: resolve the settings, plan the memory, compile every shape, load the weights.

Knows the order and what each part needs of the others; the parts know nothing of each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxinfer.config.resolve import DeviceFacts, ModelFacts, describe, resolve
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.errors import CheckpointError
from jaxinfer.kv_cache.layout import KVLayout, num_pages_for
from jaxinfer.layers.batch_types import LayerContext
from jaxinfer.logging import get_logger, log_phase
from jaxinfer.models.base import ModelDef
from jaxinfer.models.registry import define_model
from jaxinfer.parallel.mesh import Device, make_mesh
from jaxinfer.parallel.rules import replicated, sharding_of
from jaxinfer.runner.buckets import Bucket, BucketRule, make_buckets
from jaxinfer.runner.compiler import (
    CompileCounter,
    Program,
    compile_all,
    compiler_options,
    enable_persistent_cache,
)
from jaxinfer.runner.memory import (
    MemoryNeeds,
    MemoryPlan,
    available_cpu_bytes,
    estimate_temp_bytes,
    plan_memory,
    with_measured_temp,
)
from jaxinfer.runner.packing import num_words
from jaxinfer.runner.runner import DeviceArrays, Programs, Runner, Vocabulary
from jaxinfer.runner.step_fn import DeviceState, StepModel, make_step
from jaxinfer.sampling.state import SlotRow, init_state, slot_row, write_slot
from jaxinfer.tokenizer.tokenizer import load_tokenizer
from jaxinfer.weights.dummy import dummy_params
from jaxinfer.weights.hub import locate_model
from jaxinfer.weights.loader import load_params
from jaxinfer.weights.reader import CheckpointReader, open_checkpoint
from pallas_kernels.dispatch import KernelSet, choose_kernels

logger = get_logger(__name__)

ProgressCallback = Callable[[str, int, int], None]


class AbstractModel(NamedTuple):
    """A model without weights, laid out on a mesh."""

    definition: ModelDef
    mesh: Mesh
    kernels: KernelSet
    graphdef: nnx.GraphDef
    paths: tuple[tuple, ...]
    variables: tuple[nnx.Variable, ...]
    params: dict[str, jax.ShapeDtypeStruct]  # by dotted path, with shardings; in order

    @property
    def weight_bytes(self) -> int:
        """Of one device."""
        return sum(_shard_bytes(param) for param in self.params.values())


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
    platform = _platform(devices[0])
    definition = define_model(reader.config(), tensor=config.parallel.tensor_parallel_size)
    config = _resolve(config, definition, devices)
    enable_persistent_cache(config.compile.compile_cache)
    mesh = make_mesh(tensor=config.parallel.tensor_parallel_size, devices=devices)
    kernels = choose_kernels(platform=platform)
    for reason in kernels.reasons:
        logger.info("kernel %s", reason)
    model = make_abstract(definition, mesh, kernels, dtype=config.model.dtype)

    memory, limits = _plan(
        config, model, device_bytes=_device_bytes(devices[0], platform, len(devices))
    )
    with log_phase(logger, "compile"):
        programs, memory = _compile(config, model, limits, memory, progress)
    logger.info("memory of each device:\n%s", memory.table())
    with log_phase(logger, "load weights"):
        weights = _load(config, model, reader, progress)
    arrays = _allocate(config, model, limits, weights)
    jax.block_until_ready(arrays)
    counter.mark_ready()
    return Runner(
        config=config,
        limits=limits,
        memory=memory,
        mesh=mesh,
        programs=programs,
        arrays=arrays,
        vocabulary=Vocabulary(definition.shape.vocab_size, _eos_token_ids(config, reader)),
        counter=counter,
    )


def _eos_token_ids(config: EngineConfig, reader: CheckpointReader) -> tuple[int, ...]:
    """What ends a generation: the tokenizer knows; without one, what the configs say."""
    try:
        return load_tokenizer(config.model.tokenizer or reader.path).eos_token_ids
    except CheckpointError as error:
        logger.info("no tokenizer (%s): end tokens are those of config.json", error)
    ids = reader.generation_config().get("eos_token_id", reader.config().get("eos_token_id"))
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def make_abstract(
    definition: ModelDef, mesh: Mesh, kernels: KernelSet, *, dtype: str
) -> AbstractModel:
    """Shapes and shardings of a model's parameters; nothing is allocated."""
    context = LayerContext(mesh=mesh, kernels=kernels, dtype=dtype)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: definition.build(context)))
    flat = nnx.to_flat_state(state)
    params = {}
    for path, variable in flat:
        value = variable.get_value()
        params[".".join(map(str, path))] = jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, variable.spec)
        )
    return AbstractModel(
        definition=definition,
        mesh=mesh,
        kernels=kernels,
        graphdef=graphdef,
        paths=tuple(path for path, _ in flat),
        variables=tuple(variable for _, variable in flat),
        params=params,
    )


def _platform(device: Device) -> str:
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def _resolve(config: EngineConfig, definition: ModelDef, devices: list[Device]) -> EngineConfig:
    shape = definition.shape
    platform = _platform(devices[0])
    resolution = resolve(
        config,
        ModelFacts(
            max_position_embeddings=shape.max_position_embeddings, dtype=shape.checkpoint_dtype
        ),
        DeviceFacts(
            platform=platform,
            device_kind=devices[0].device_kind,
            num_devices=len(devices),
            memory_bytes=_device_bytes(devices[0], platform, len(devices)),
        ),
    )
    logger.info("settings that were chosen:\n%s", describe(resolution.choices))
    return resolution.config


def _device_bytes(device: Device, platform: str, num_devices: int) -> int:
    """Memory of one device; virtual CPU devices share the machine's."""
    if platform == "cpu":
        return available_cpu_bytes() // num_devices
    return int(device.memory_stats()["bytes_limit"])


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's part."""
    return int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize


def _plan(
    config: EngineConfig, model: AbstractModel, *, device_bytes: int
) -> tuple[MemoryPlan, EngineLimits]:
    """The number of pages, from an estimate of the temporaries, and with it all limits."""
    shape, scheduler = model.definition.shape, config.scheduler
    assert scheduler.max_num_seqs and scheduler.max_num_batched_tokens
    assert config.model.max_model_len
    tensor = config.parallel.tensor_parallel_size
    storage = model.kernels.kv_storage_dtype(config.cache.kv_cache_dtype)
    widest = max(max(param.shape) for path, param in model.params.items() if "layers" in path)
    memory = plan_memory(
        MemoryNeeds(
            platform=_platform(model.mesh.devices.flat[0]),
            device_bytes=device_bytes,
            weight_bytes=model.weight_bytes,
            state_bytes=_state_bytes(model, scheduler.max_num_seqs),
            temp_bytes=estimate_temp_bytes(
                num_tokens=scheduler.max_num_batched_tokens,
                num_seqs=scheduler.max_num_seqs,
                model_dim_bytes=4 * widest,
                vocab_size=shape.vocab_size,
            ),
            layout=KVLayout(
                num_layers=shape.num_layers,
                num_kv_heads=shape.num_kv_heads // tensor,
                head_dim=shape.head_dim,
                dtype_bytes=storage.itemsize,
                page_size=config.cache.block_size,
            ),
            max_model_len=config.model.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
        ),
        config.cache,
    )
    limits = EngineLimits(
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_model_len=config.model.max_model_len,
        page_size=config.cache.block_size,
        num_pages=memory.num_pages,
    )
    return memory, limits


def _state_bytes(model: AbstractModel, max_num_seqs: int) -> int:
    state = jax.eval_shape(
        lambda: init_state(max_num_seqs=max_num_seqs, vocab_size=model.definition.shape.vocab_size)
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


class _AbstractArrays(NamedTuple):
    weights: tuple[jax.ShapeDtypeStruct, ...]
    pages_L: tuple[jax.ShapeDtypeStruct, ...]
    state: DeviceState


def _abstract_arrays(
    config: EngineConfig, model: AbstractModel, limits: EngineLimits
) -> _AbstractArrays:
    """Shapes and shardings of everything that lives on the devices."""
    shape = model.definition.shape
    whole = replicated(model.mesh)

    def on_every_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    pages = jax.ShapeDtypeStruct(
        (limits.num_pages, shape.num_kv_heads, limits.page_size, 2 * shape.head_dim),
        model.kernels.kv_storage_dtype(config.cache.kv_cache_dtype),
        sharding=sharding_of(model.mesh, "PKBC"),
    )
    columns = num_pages_for(limits.max_model_len, limits.page_size)
    state = jax.eval_shape(
        lambda: DeviceState(
            page_table_RM=jnp.zeros((limits.max_num_seqs, columns), jnp.int32),
            sampler=init_state(max_num_seqs=limits.max_num_seqs, vocab_size=shape.vocab_size),
        )
    )
    return _AbstractArrays(
        weights=tuple(model.params.values()),
        pages_L=(pages,) * shape.num_layers,
        state=jax.tree.map(on_every_device, state),
    )


def _compile(
    config: EngineConfig,
    model: AbstractModel,
    limits: EngineLimits,
    memory: MemoryPlan,
    progress: ProgressCallback,
) -> tuple[Programs, MemoryPlan]:
    """Every program; the temporaries of the largest step settle the memory plan."""
    arrays = _abstract_arrays(config, model, limits)
    step_model = StepModel(
        graphdef=model.graphdef,
        paths=model.paths,
        variables=model.variables,
        kernels=model.kernels,
        vocab_size=model.definition.shape.vocab_size,
        page_size=limits.page_size,
        num_pages=limits.num_pages,
    )
    buckets = make_buckets(limits, _bucket_rule(config), token_buckets=config.compile.token_buckets)
    programs = {
        str(bucket): _step_program(step_model, bucket, arrays, limits) for bucket in buckets
    } | _slot_programs(model, arrays)
    assert config.compile.num_compile_workers
    compiled = compile_all(
        programs,
        compiler_options(config.compile.device),
        num_workers=config.compile.num_compile_workers,
        on_done=lambda done, total: progress("compile", done, total),
    )
    steps = {bucket: compiled[str(bucket)] for bucket in buckets}
    temp_bytes = max(_temp_bytes(step) for step in steps.values())
    measured = with_measured_temp(memory, temp_bytes)
    return (
        Programs(
            steps=steps, write_slot=compiled["write_slot"], write_pages=compiled["write_pages"]
        ),
        measured,
    )


def _temp_bytes(step: jax.stages.Compiled) -> int:
    analysis = step.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0


def _bucket_rule(config: EngineConfig) -> BucketRule:
    """A CPU compiles slowly and multiplies more rows at nearly the same price: few buckets.

    XLA:CPU multiplies fewer than 4 rows of 16-bit floats one number at a time.
    """
    if config.compile.device != "cpu":
        return BucketRule(smallest_decode=1, decode_factor=2, token_factor=4)
    smallest = 1 if config.model.dtype == "float32" else 4
    return BucketRule(smallest_decode=smallest, decode_factor=4, token_factor=4)


def _step_program(
    model: StepModel, bucket: Bucket, arrays: _AbstractArrays, limits: EngineLimits
) -> Program:
    sharding = jax.tree.leaves(arrays.state)[0].sharding
    words = jax.ShapeDtypeStruct(
        (num_words(bucket, limits.page_size),), jnp.int32, sharding=sharding
    )
    return Program(
        function=make_step(model, bucket),
        args=(arrays.weights, arrays.pages_L, arrays.state, words),
        donate=(1, 2),
    )


def _slot_programs(model: AbstractModel, arrays: _AbstractArrays) -> dict[str, Program]:
    """The two small programs that write a slot's row ahead of a step."""
    whole = replicated(model.mesh)

    def abstract(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole)

    def write_sampler(state: DeviceState, slot: jax.Array, row: SlotRow) -> DeviceState:
        return state._replace(sampler=write_slot(state.sampler, slot, row))

    def write_pages(state: DeviceState, slot: jax.Array, row_M: jax.Array) -> DeviceState:
        return state._replace(page_table_RM=state.page_table_RM.at[slot].set(row_M))

    empty_row = slot_row(
        SamplingParams(),
        prompt_token_ids=(),
        output_token_ids=(),
        eos_token_ids=(),
        vocab_size=model.definition.shape.vocab_size,
    )
    slot = abstract(np.zeros((), np.int32))
    row_M = abstract(np.zeros(arrays.state.page_table_RM.shape[1], np.int32))
    row = jax.tree.map(abstract, empty_row)
    return {
        "write_slot": Program(function=write_sampler, args=(arrays.state, slot, row), donate=(0,)),
        "write_pages": Program(function=write_pages, args=(arrays.state, slot, row_M), donate=(0,)),
    }


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


def _allocate(
    config: EngineConfig,
    model: AbstractModel,
    limits: EngineLimits,
    weights: tuple[jax.Array, ...],
) -> DeviceArrays:
    """Empty pages and slots, made on the devices."""
    abstract = _abstract_arrays(config, model, limits)
    template = abstract.pages_L[0]

    def make_pages() -> jax.Array:
        return jnp.zeros(template.shape, template.dtype)

    def make_state() -> DeviceState:
        return DeviceState(
            page_table_RM=jnp.zeros(abstract.state.page_table_RM.shape, jnp.int32),
            sampler=init_state(
                max_num_seqs=limits.max_num_seqs, vocab_size=model.definition.shape.vocab_size
            ),
        )

    pages = jax.jit(make_pages, out_shardings=template.sharding)
    state = jax.jit(make_state, out_shardings=replicated(model.mesh))
    return DeviceArrays(
        weights=weights, pages_L=tuple(pages() for _ in abstract.pages_L), state=state()
    )
