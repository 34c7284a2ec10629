"""How an array lies in a TPU's memory, where XLA has to be told. Knows platforms, no layers."""

import jax
from jax import Array, shard_map
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from jaxinfer.parallel.rules import spec_of


def heads_first(x_TKGH: Array, mesh: Mesh) -> Array:
    """The same values. A TPU keeps a head's rows together, [K, G, T, H], as its attention kernels
    read and write them: without a word XLA finds one layout for queries, another one for keys, and
    copies all of a layer's projections for it (docs/decisions/0016)."""

    def constrain(x_TKGH: Array) -> Array:
        return with_layout_constraint(x_TKGH, Layout(major_to_minor=(1, 2, 0, 3)))

    def on_device(x_TKGH: Array) -> Array:
        return jax.lax.platform_dependent(x_TKGH, tpu=constrain, default=lambda x: x)

    # (XLA gathers an array before it constrains it.)
    spec = spec_of("TKGH")
    return shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(x_TKGH)
