"""The gated MLP: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

import jax
from flax import nnx
from jax import Array

from jaxinfer.layers.batch_types import LayerContext
from jaxinfer.layers.einsum import Einsum


class GatedMLP(nnx.Module):
    """Gate and up projections are one matmul; U=2 is gate, then up."""

    def __init__(
        self, context: LayerContext, *, model_dim: int, hidden_dim: int, use_bias: bool
    ) -> None:
        dims = {"D": model_dim, "U": 2, "F": hidden_dim}
        self.gate_up = Einsum(context, "TD,DUF->TUF", bias="UF" if use_bias else None, **dims)
        self.down = Einsum(context, "TF,FD->TD", bias="D" if use_bias else None, **dims)

    def __call__(self, x_TD: Array, *, num_rows: Array) -> Array:
        gate_up_TUF = self.gate_up(x_TD, num_rows=num_rows)
        hidden_TF = jax.nn.silu(gate_up_TUF[:, 0]) * gate_up_TUF[:, 1]
        return self.down(hidden_TF, num_rows=num_rows)
