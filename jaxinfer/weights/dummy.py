"""Random weights made on the devices: `--load-format dummy`, and tests without checkpoints.

Knows shapes, shardings and, where given, pieces (only to keep padding zero). Reads nothing.
"""

import math
import zlib
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.layers.packing import Packing
from jaxinfer.models.pieces import ParamPieces, Region

_STDDEV = 0.02  # as trained models are initialised, so that activations stay in range

Bounds = tuple[tuple[int, int], ...]
"""A region as (start, stop) per dimension."""


def dummy_params(
    abstract: dict[str, jax.ShapeDtypeStruct],
    seed: int,
    *,
    pieces: ParamPieces | None = None,
    packings: Mapping[str, Packing] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """Random parameters for every entry of `abstract`, in its dtype and sharding.

    Uniform with standard deviation 0.02, around 1 for scales of norms and around 0 for all else.
    A value depends on the seed, the parameter's path and shape and its position, not on the
    sharding. With `pieces`, what no piece covers is zero, as in real weights. Those in `packings`
    are made in their own shape and then packed.
    """
    params: dict[str, jax.Array] = {}
    for path, stored in abstract.items():
        target = stored
        if path in packings:
            plain = packings[path].plain
            target = jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=stored.sharding)
        regions = tuple(piece.region for piece in pieces[path]) if pieces is not None else ((),)
        bounds = tuple(_bounds(region, target.shape) for region in regions)
        make = _maker(
            tuple(target.shape),
            jnp.dtype(target.dtype),
            target.sharding,
            mean=1.0 if _is_norm(path, target) else 0.0,
            covered=() if _cover_all(bounds, target.shape) else bounds,
        )
        param = make(np.uint32(zlib.crc32(f"{seed}:{path}".encode())))
        if path in packings:
            param = jax.device_put(packings[path].pack(np.asarray(param)), stored.sharding)
        params[path] = param
    return params


def _is_norm(path: str, target: jax.ShapeDtypeStruct) -> bool:
    return len(target.shape) == 1 and "bias" not in path


def _cover_all(regions: tuple[Bounds, ...], shape: tuple[int, ...]) -> bool:
    """Whether regions, which do not overlap, leave nothing out."""
    volumes = (math.prod(stop - start for start, stop in region) for region in regions)
    return sum(volumes) == math.prod(shape)


def _bounds(region: Region, shape: tuple[int, ...]) -> Bounds:
    bounds: list[tuple[int, int]] = []
    for dim, size in enumerate(shape):
        part = region[dim] if dim < len(region) else slice(None)
        if isinstance(part, int):
            bounds.append((part % size, part % size + 1))
        else:
            start, stop, step = part.indices(size)
            assert step == 1, f"region {region} has a step"
            bounds.append((start, stop))
    return tuple(bounds)


@lru_cache(maxsize=256)
def _maker(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    *,
    mean: float,
    covered: tuple[Bounds, ...],
) -> jax.stages.Wrapped:
    """A compiled program for one kind of parameter: layers share them, so few are compiled.

    Elements outside `covered` are zero; () covers everything.
    """

    def make(salt: jax.Array) -> jax.Array:
        uniform = _uniform(salt, shape) * jnp.float32(_STDDEV * math.sqrt(12))
        values = (uniform + jnp.float32(mean)).astype(dtype)
        if not covered:
            return values
        return jnp.where(_inside(covered, shape), values, jnp.zeros((), dtype))

    return jax.jit(make, out_shardings=sharding)


def _uniform(salt: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """float32 in [-0.5, 0.5) from a hash of each element's index and the salt.

    jax.random takes ten times as long on a CPU, and billions of numbers are made here; no
    statistics depend on them.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for dim, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    bits = _mix(_mix(index) ^ salt)
    return bits.astype(jnp.float32) / jnp.float32(2**32) - jnp.float32(0.5)


def _mix(x: jax.Array) -> jax.Array:
    """The `lowbias32` integer hash (C. Wellons, https://nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def _inside(regions: tuple[Bounds, ...], shape: tuple[int, ...]) -> jax.Array:
    """bool[shape] from comparisons of indices: XLA would fold constants for seconds."""
    mask = jnp.zeros(shape, bool)
    for region in regions:
        inside = jnp.ones(shape, bool)
        for dim, (start, stop) in enumerate(region):
            index = jax.lax.broadcasted_iota(jnp.int32, shape, dim)
            inside &= (index >= start) & (index < stop)
        mask |= inside
    return mask
