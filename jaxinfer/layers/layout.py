"""How an array lies in a device's memory, where XLA has to be told. Knows platforms, no layers."""

import jax
from jax import Array, shard_map
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from jaxinfer.parallel.rules import spec_of


def heads_first(x_TKGH: Array, mesh: Mesh) -> Array:
    """The same values. A TPU keeps a head's rows together, [K, G, T, H], as its attention kernels
    read and write them: without a word XLA finds one layout for queries, another one for keys, and
    copies all of a layer's projections for it (docs/decisions/0016)."""
    return _laid_out(x_TKGH, (1, 2, 0, 3), "TKGH", mesh, "tpu")


def rows_first(x_SV: Array, mesh: Mesh) -> Array:
    """The same values. On a GPU XLA has products of few rows write columns, and turns them where a
    row is searched for its maximum."""
    return _laid_out(x_SV, (0, 1), "SV", mesh, "cuda", "rocm")


def _laid_out(
    x: Array, major_to_minor: tuple[int, ...], letters: str, mesh: Mesh, *platforms: str
) -> Array:
    def constrain(x: Array) -> Array:
        return with_layout_constraint(x, Layout(major_to_minor=major_to_minor))

    def on_device(x: Array) -> Array:
        branches = dict.fromkeys(platforms, constrain)
        return jax.lax.platform_dependent(x, **branches, default=lambda x: x)

    # (XLA gathers an array before it constrains it.)
    spec = spec_of(letters)
    return shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(x)
