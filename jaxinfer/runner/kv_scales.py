"""The scales of keys and values in pages of 8 bits: the checkpoint's, or measured at the start.

A checkpoint that was calibrated has one a layer or one a head. For all others a step of random
tokens runs once with pages of float32, and each head's largest key and value become what the
largest stored number means, with room to spare: random words make neither the largest keys nor the
smallest. Knows the model as a function, no requests.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.errors import CheckpointError
from jaxinfer.kv_cache.layout import page_dtype
from jaxinfer.layers.batch_types import StepBatch
from jaxinfer.logging import get_logger
from jaxinfer.parallel.rules import replicated, sharding_of
from jaxinfer.runner.abstract import AbstractModel, make_abstract
from jaxinfer.runner.compiler import Program, compile_all, compiler_options
from jaxinfer.runner.program_store import ProgramStore
from jaxinfer.weights.reader import CheckpointReader
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.api import StepLayout, locate_tokens
from pallas_kernels.paged_attention.quantized import largest_value

logger = get_logger(__name__)

NUM_TOKENS = 256
HEADROOM: Mapping[str, float] = {"int8": 1.1, "float8_e4m3fn": 1.5}
"""By page dtype: what is spared above the largest measured value. It costs a float no accuracy."""

_NAMES = ("self_attn.{part}_scale", "self_attn.{part}_proj.{part}_scale",
          "self_attn.{part}_proj.output_scale")  # fmt: skip
"""Of compressed-tensors and its predecessors, below "model.layers.N."."""


def make_kv_scales(
    config: EngineConfig,
    model: AbstractModel,
    reader: CheckpointReader,
    weights: Mapping[str, Array],
    store: ProgramStore | None,
) -> dict[str, Array]:
    """Every scale of `model.kv_scales`, on its devices; `weights` are all other parameters.

    Raises CheckpointError for scales that fit neither the heads nor the arithmetic.
    """
    if not model.kv_scales:
        return {}
    found = _read(model, reader)
    missing = model.kv_scales.keys() - found
    if missing:
        logger.info(
            "KV scales: %d of %d are not in the checkpoint and are measured with %d random tokens",
            len(missing), len(model.kv_scales), NUM_TOKENS,
        )  # fmt: skip
        found = _measure(config, model, weights, store) | found
    return {
        path: jax.device_put(found[path].astype(np.float32), model.params[path].sharding)
        for path in model.kv_scales
    }


def _read(model: AbstractModel, reader: CheckpointReader) -> dict[str, np.ndarray]:
    """Those that the checkpoint has, float [K] by the parameter's path."""
    there = reader.tensors()
    found: dict[str, np.ndarray] = {}
    for path, scale in model.kv_scales.items():
        names = (f"model.layers.{scale.layer}.{name.format(part=scale.part)}" for name in _NAMES)
        name = next((name for name in names if name in there), None)
        if name is not None:
            found[path] = _of_heads(np.asarray(reader.read(name), np.float32), model, name)
    return found


def _of_heads(values: np.ndarray, model: AbstractModel, name: str) -> np.ndarray:
    shape = model.definition.shape
    source = shape.kv_source or tuple(range(shape.num_kv_heads))
    num_heads = max(source) + 1
    if values.size not in (1, num_heads) or not (np.isfinite(values) & (values > 0)).all():
        raise CheckpointError(
            f"{name} must hold one positive scale or {num_heads}, one a head; it holds "
            f"{values.ravel()[:8].tolist()}. Repair the checkpoint, or leave out the 8-bit "
            "--kv-cache-dtype."
        )
    values = np.broadcast_to(values.ravel(), (num_heads,))
    return np.array([values[head] if head >= 0 else 1.0 for head in source], np.float32)


def _measure(
    config: EngineConfig,
    model: AbstractModel,
    weights: Mapping[str, Array],
    store: ProgramStore | None,
) -> dict[str, np.ndarray]:
    """Float [K] by path, from one step of random tokens."""
    dtype = page_dtype(config.cache.kv_cache_dtype)
    plain = make_abstract(
        model.definition,
        model.mesh,
        replace(model.kernels, plan_attention=xla.plan, paged_attention=xla.paged_attention),
        dtype=config.model.dtype,
    )
    largest_L2K = _run_once(config, plain, tuple(weights[path] for path in plain.params), store)
    is_usable = np.isfinite(largest_L2K) & (largest_L2K > 0)  # dummy heads have zeros
    scales_L2K = largest_L2K * (HEADROOM[dtype] / largest_value(dtype))
    scales_L2K = np.where(is_usable, scales_L2K, 1.0)
    return {path: scales_L2K[s.layer, "kv".index(s.part)] for path, s in model.kv_scales.items()}


def _run_once(
    config: EngineConfig,
    model: AbstractModel,
    weights: tuple[Array, ...],
    store: ProgramStore | None,
) -> np.ndarray:
    """The largest key and value of each layer and head, float32 [L, 2, K]."""
    max_model_len, num_workers = config.model.max_model_len, config.compile.num_compile_workers
    assert max_model_len and num_workers
    num_tokens = min(NUM_TOKENS, max_model_len)
    vocab_size = model.definition.shape.vocab_size
    tokens_T = np.random.default_rng(config.model.seed).integers(0, vocab_size, num_tokens)
    tokens = jax.device_put(tokens_T.astype(np.int32), replicated(model.mesh))
    abstract = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=tokens.sharding)
    program = Program(
        function=_largest_of(model, num_tokens),
        args=(tuple(model.params.values()), abstract),
        donate=(),
    )
    compiled = compile_all(
        {"measure KV scales": program},
        compiler_options(config.compile.device, num_workers=num_workers),
        num_workers=1,
        on_done=lambda *_: None,
        store=store,
    )
    return np.asarray(compiled["measure KV scales"](weights, tokens))


def _largest_of(
    model: AbstractModel, num_tokens: int
) -> Callable[[tuple[Array, ...], Array], Array]:
    """A step of one sequence, whose keys and values all lie in one page."""
    shape = model.definition.shape
    step_model = model.step_model(
        EngineLimits(
            max_num_seqs=1,
            max_num_batched_tokens=num_tokens,
            max_model_len=num_tokens,
            page_size=num_tokens,
            num_pages=1,
        )
    )
    pages_shape = (1, shape.num_kv_heads, num_tokens, 2 * shape.head_dim)

    def largest(weights: tuple[Array, ...], token_ids_T: Array) -> Array:
        layout = StepLayout(
            slots_S=jnp.zeros(1, jnp.int32),
            starts_S=jnp.zeros(1, jnp.int32),
            query_starts_S1=jnp.asarray([0, num_tokens], jnp.int32),
            num_seqs=jnp.int32(1),
            num_decodes=jnp.int32(0),
            page_table_RM=jnp.zeros((1, 1), jnp.int32),
        )
        places = locate_tokens(layout, num_tokens=num_tokens, num_pages=1, page_size=num_tokens)
        batch = StepBatch(
            positions_T=places.position_T,
            num_tokens=jnp.int32(num_tokens),
            attention=xla.plan(layout, places, decode_only=False),
        )
        pages = jax.lax.with_sharding_constraint(
            jnp.zeros(pages_shape, jnp.float32), sharding_of(model.mesh, "PKBC")
        )
        _, pages_L = step_model.bind(weights)(token_ids_T, (pages,) * shape.num_layers, batch)
        largest_LKC = jnp.stack([jnp.abs(pages_PKBC).max(axis=(0, 2)) for pages_PKBC in pages_L])
        halves_LK2H = largest_LKC.reshape(*largest_LKC.shape[:2], 2, shape.head_dim)
        largest_L2K = halves_LK2H.max(axis=-1).swapaxes(1, 2)
        return jax.lax.with_sharding_constraint(largest_L2K, replicated(model.mesh))

    return largest
