"""A weight and the einsum that applies it: math, layout and sharding from one string.

Weights have the contracted dimensions first ("DKRH" for "TD,DKRH->TKRH"): XLA then reads them in
the order they lie in memory on every platform (measured on the CPU: a weight whose contracted
dimension is last and that has two output dimensions is transposed on every call). A product that
stores weights in a layout of its own (`KernelSet.matmul`) is used where there is one.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxinfer.layers.batch_types import LayerContext
from jaxinfer.layers.packing import packed_weight, packing_of
from jaxinfer.parallel.rules import sharding_of, spec_of


def weight(context: LayerContext, letters: str, **dims: int) -> nnx.Param:
    """A parameter of zeros whose shape and sharding follow from its letters.

    Made under `nnx.eval_shape`, so the zeros never exist; weights/loader.py fills it.
    """
    shape = tuple(dims[letter] for letter in letters)
    return nnx.Param(jnp.zeros(shape, context.dtype), spec=spec_of(letters))


class Einsum(nnx.Module):
    """`Einsum(context, "TD,DUF->TUF", D=576, U=2, F=1536)`: one projection, optionally biased.

    The first operand is the activation, the second the weight; the contracted dimensions are the
    activation's last and the weight's first, in the same order. When one of them is split over
    the mesh, the output's sharding constraint is what makes XLA add the parts up.
    """

    def __init__(
        self, context: LayerContext, equation: str, *, bias: str | None = None, **dims: int
    ) -> None:
        operands, out = equation.split("->")
        x, kernel = operands.split(",")
        contracted = [letter for letter in kernel if letter in x]
        num = len(contracted)
        if x[-num:] != kernel[:num] or out != x[:-num] + kernel[num:]:
            raise ValueError(f"{equation!r} must contract the last of x with the first of kernel")
        self.contracted = (tuple(range(len(x) - num, len(x))), tuple(range(num)))
        shape = tuple(dims[letter] for letter in kernel)
        self.packing = packing_of(context, shape, num_contracted=num)
        self.kernel = (
            weight(context, kernel, **dims) if self.packing is None else packed_weight(self.packing)
        )
        self.bias = weight(context, bias, **dims) if bias else None
        self.out_sharding = sharding_of(context.mesh, out)

    def __call__(self, x: Array, *, num_rows: Array) -> Array:
        """[T, ...] -> [T, ...]; rows from `num_rows` (int32 scalar) on are padding and may come
        out as anything finite."""
        kernel = self.kernel.get_value()
        if self.packing is not None:
            out = self.packing.matmul(x, kernel, num_rows=num_rows)
        else:
            # Not jnp.einsum: it may contract in another order, and XLA transposes the weight then.
            out = jax.lax.dot_general(
                x, kernel, (self.contracted, ((), ())), preferred_element_type=x.dtype
            )
            out = jax.lax.with_sharding_constraint(out, self.out_sharding)
        if self.bias is not None:
            out = out + self.bias.get_value()
        return out
