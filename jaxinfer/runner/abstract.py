"""A model and its device arrays as shapes and shardings, before any of it exists; then the arrays.

Knows the layout of everything that lives on the devices between steps. Knows no settings beyond
sizes, no files and no programs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxinfer.core.limits import EngineLimits
from jaxinfer.kv_cache.layout import has_scales, num_pages_for, page_dtype
from jaxinfer.layers.batch_types import LayerContext
from jaxinfer.layers.packing import Packing
from jaxinfer.models.base import ModelDef
from jaxinfer.parallel.rules import replicated, sharding_of
from jaxinfer.runner.page_mapping import map_in_background
from jaxinfer.runner.runner import Allocate, DeviceMemory
from jaxinfer.runner.step_fn import DeviceState, StepModel
from jaxinfer.sampling.state import init_state
from pallas_kernels.dispatch import KernelSet


class KVScale(NamedTuple):
    """Which scale a parameter is."""

    layer: int
    part: str  # "k" or "v"


class AbstractModel(NamedTuple):
    """A model without weights, laid out on a mesh."""

    definition: ModelDef
    mesh: Mesh
    kernels: KernelSet
    graphdef: nnx.GraphDef
    paths: tuple[tuple, ...]
    variables: tuple[nnx.Variable, ...]
    params: dict[str, jax.ShapeDtypeStruct]  # by dotted path, with shardings; in order
    packings: dict[str, Packing]  # of the params that are stored otherwise than as arrays
    kv_scales: dict[str, KVScale]  # the params that no checkpoint need have

    @property
    def checkpoint_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Those that a checkpoint must have."""
        return {path: p for path, p in self.params.items() if path not in self.kv_scales}

    @property
    def weight_bytes(self) -> int:
        """Of one device."""
        return sum(_shard_bytes(param) for param in self.params.values())

    @property
    def widest_dim(self) -> int:
        """The longest dimension of a layer's parameters: bounds the width of its activations."""
        shapes = {path: param.shape for path, param in self.params.items()}
        shapes |= {path: packing.shape for path, packing in self.packings.items()}
        return max(max(shape) for path, shape in shapes.items() if "layers" in path)

    def step_model(self, limits: EngineLimits) -> StepModel:
        """What the step function needs of the model."""
        return StepModel(
            graphdef=self.graphdef,
            paths=self.paths,
            variables=self.variables,
            kernels=self.kernels,
            mesh=self.mesh,
            vocab_size=self.definition.shape.vocab_size,
            page_size=limits.page_size,
            num_pages=limits.num_pages,
        )


class AbstractArrays(NamedTuple):
    """What lives on the devices, as shapes, dtypes and shardings."""

    weights: tuple[jax.ShapeDtypeStruct, ...]
    pages_L: tuple[jax.ShapeDtypeStruct, ...]
    state: DeviceState


def make_abstract(
    definition: ModelDef,
    mesh: Mesh,
    kernels: KernelSet,
    *,
    dtype: str,
    kv_cache_dtype: str = "auto",
) -> AbstractModel:
    """Shapes and shardings of a model's parameters; nothing is allocated.

    With a `kv_cache_dtype` of 8 bits the layers have scales: `AbstractModel.kv_scales`.
    """
    context = LayerContext(
        mesh=mesh, kernels=kernels, dtype=dtype, kv_scales=has_scales(kv_cache_dtype)
    )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: definition.build(context)))
    flat = nnx.to_flat_state(state)
    params, packings, kv_scales = {}, {}, {}
    for path, variable in flat:
        name, value, metadata = (
            ".".join(map(str, path)),
            variable.get_value(),
            variable.get_metadata(),
        )
        params[name] = jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, metadata["spec"])
        )
        if "packing" in metadata:
            packings[name] = metadata["packing"]
        if "kv_scale" in metadata:
            layer = next(part for part in path if isinstance(part, int))
            kv_scales[name] = KVScale(layer, metadata["kv_scale"])
    return AbstractModel(
        definition=definition,
        mesh=mesh,
        kernels=kernels,
        graphdef=graphdef,
        paths=tuple(path for path, _ in flat),
        variables=tuple(variable for _, variable in flat),
        params=params,
        packings=packings,
        kv_scales=kv_scales,
    )


def abstract_arrays(
    model: AbstractModel, limits: EngineLimits, *, kv_cache_dtype: str
) -> AbstractArrays:
    """Shapes and shardings of everything that lives on the devices."""
    shape = model.definition.shape
    whole = replicated(model.mesh)

    def on_every_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    pages = jax.ShapeDtypeStruct(
        (limits.num_pages, shape.num_kv_heads, limits.page_size, 2 * shape.head_dim),
        model.kernels.kv_storage_dtype(page_dtype(kv_cache_dtype)),
        sharding=sharding_of(model.mesh, "PKBC"),
    )
    state = jax.eval_shape(lambda: _state_of(limits, shape.vocab_size))
    return AbstractArrays(
        weights=tuple(model.params.values()),
        pages_L=(pages,) * shape.num_layers,
        state=jax.tree.map(on_every_device, state),
    )


def make_allocator(
    model: AbstractModel, limits: EngineLimits, abstract: AbstractArrays
) -> Allocate:
    """What makes empty pages and slots on the devices; compiled once, called at each reset."""
    template = abstract.pages_L[0]

    def make_pages() -> jax.Array:
        return model.kernels.empty_pages(template.shape, template.dtype)

    def make_state() -> DeviceState:
        return _state_of(limits, model.definition.shape.vocab_size)

    pages = jax.jit(make_pages, out_shardings=template.sharding).lower().compile()
    state = jax.jit(make_state, out_shardings=replicated(model.mesh)).lower().compile()

    def allocate() -> DeviceMemory:
        pages_L = tuple(pages() for _ in abstract.pages_L)
        if model.kernels.pages_are_unmapped:
            map_in_background(pages_L)
        return DeviceMemory(pages_L=pages_L, state=state())

    return allocate


def state_bytes(*, max_num_seqs: int, max_model_len: int, page_size: int, vocab_size: int) -> int:
    """Size of the slots' state, which every device holds whole."""
    state = jax.eval_shape(
        lambda: _empty_state(
            max_num_seqs=max_num_seqs,
            num_columns=num_pages_for(max_model_len, page_size),
            vocab_size=vocab_size,
        )
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _empty_state(*, max_num_seqs: int, num_columns: int, vocab_size: int) -> DeviceState:
    return DeviceState(
        page_table_RM=jnp.zeros((max_num_seqs, num_columns), jnp.int32),
        sampler=init_state(max_num_seqs=max_num_seqs, vocab_size=vocab_size),
    )


def _state_of(limits: EngineLimits, vocab_size: int) -> DeviceState:
    return _empty_state(
        max_num_seqs=limits.max_num_seqs,
        num_columns=num_pages_for(limits.max_model_len, limits.page_size),
        vocab_size=vocab_size,
    )


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's part."""
    assert array.sharding is not None
    return int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize
