"""Weights in the layout that a kernel wants, instead of as arrays of their own shape.

Knows `KernelSet.matmul` and shapes; knows no checkpoints. A `Packing` goes with a parameter as
metadata, so that who loads it can store it right.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from jaxinfer.layers.batch_types import LayerContext
from pallas_kernels.matmul.cpu import PanelMatmul


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a weight of `shape` is stored as a matrix [depth, columns].

    The first `num_contracted` dimensions are the matrix's depth, the others its columns; with
    `columns_first` it is the other way round, as in an embedding table.
    """

    kernel: PanelMatmul
    shape: tuple[int, ...]
    num_contracted: int
    columns_first: bool = False

    @property
    def column_shape(self) -> tuple[int, ...]:
        if self.columns_first:
            return self.shape[: -self.num_contracted]
        return self.shape[self.num_contracted :]

    @property
    def num_columns(self) -> int:
        return math.prod(self.column_shape)

    @property
    def depth(self) -> int:
        return math.prod(self.shape) // self.num_columns

    @property
    def stored(self) -> jax.ShapeDtypeStruct:
        return self.kernel.stored(depth=self.depth, num_columns=self.num_columns)

    @property
    def plain(self) -> jax.ShapeDtypeStruct:
        """The weight before it is packed, in the type that packing rounds to."""
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.kernel.dtype))

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """The stored form of a weight of `shape`."""
        assert weight.shape == self.shape, f"{weight.shape} is not {self.shape}"
        if self.columns_first:
            return self.kernel.pack(weight.reshape(self.num_columns, self.depth).T)
        return self.kernel.pack(weight.reshape(self.depth, self.num_columns))

    def matmul(self, x: Array, stored: Array, *, num_rows: Array) -> Array:
        """[M, *depth] x weight -> [M, *columns], in x's type; rows from `num_rows` on are zero."""
        rows = x.shape[0]
        out = self.kernel(
            x.reshape(rows, self.depth).astype(jnp.float32),
            stored,
            num_columns=self.num_columns,
            num_rows=num_rows,
        )
        return out.astype(x.dtype).reshape(rows, *self.column_shape)


def packing_of(
    context: LayerContext,
    shape: tuple[int, ...],
    *,
    num_contracted: int,
    columns_first: bool = False,
) -> Packing | None:
    """The packing of a weight; None when it stays as it is."""
    kernel = context.kernels.matmul
    if kernel is None:
        return None
    packing = Packing(
        kernel=kernel, shape=shape, num_contracted=num_contracted, columns_first=columns_first
    )
    return packing if kernel.fits(packing.depth) else None


def packed_weight(packing: Packing) -> nnx.Param:
    """The parameter of a packed weight; made under `nnx.eval_shape`."""
    stored = packing.stored
    return nnx.Param(jnp.zeros(stored.shape, stored.dtype), spec=PartitionSpec(), packing=packing)
