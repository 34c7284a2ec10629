"""The token embedding and the output head; the vocabulary is split over the tensor axis."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, shard_map
from jax.sharding import PartitionSpec

from jaxinfer.layers.batch_types import LayerContext
from jaxinfer.layers.einsum import weight
from jaxinfer.layers.packing import packed_weight, packing_of
from jaxinfer.parallel.rules import TENSOR_AXIS, sharding_of


class Embedding(nnx.Module):
    """Rows of a table [V, D]. `attend` uses the same table as the output head (tied weights)."""

    def __init__(self, context: LayerContext, *, V: int, D: int) -> None:  # noqa: N803
        self.packing = packing_of(context, (V, D), num_contracted=1, columns_first=True)
        self.table = (
            weight(context, "VD", V=V, D=D) if self.packing is None else packed_weight(self.packing)
        )
        self.mesh = context.mesh
        self.dtype = context.dtype

    def __call__(self, token_ids_T: Array) -> Array:
        """[T] int32 ids -> [T, D]. Each device looks up the rows it has; the sum is the answer."""
        if self.packing is not None:
            found_TD = self.packing.kernel.columns(self.table.get_value(), token_ids_T)
            return found_TD.astype(self.dtype)

        def lookup(ids_T: Array, table_VD: Array) -> Array:
            rows = table_VD.shape[0]
            local_T = ids_T - jax.lax.axis_index(TENSOR_AXIS) * rows
            is_here_T = (local_T >= 0) & (local_T < rows)
            found_TD = table_VD[local_T.clip(0, rows - 1)]
            found_TD = jnp.where(is_here_T[:, None], found_TD, jnp.zeros_like(found_TD))
            return jax.lax.psum(found_TD, TENSOR_AXIS)

        return shard_map(
            lookup,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(TENSOR_AXIS)),
            out_specs=PartitionSpec(),
        )(token_ids_T, self.table.get_value())

    def attend(self, x_SD: Array, *, num_rows: Array) -> Array:
        """[S, D] -> logits [S, V], float32, split as the table is; see Einsum for `num_rows`."""
        if self.packing is not None:
            return self.packing.matmul(
                x_SD.astype(jnp.float32), self.table.get_value(), num_rows=num_rows
            )
        logits_SV = jnp.einsum(
            "SD,VD->SV", x_SD, self.table.get_value(), preferred_element_type=jnp.float32
        )
        # Said here, or XLA may gather the table for a user that wants whole logits.
        return jax.lax.with_sharding_constraint(logits_SV, sharding_of(self.mesh, "SV"))
