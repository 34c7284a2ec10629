"""What the engine asks of every model family, and how a family is described to it.

A family is one file: a frozen config read from Hugging Face's config.json, a Flax NNX module over
flat tokens, and the table that says which checkpoint tensors make up its parameters. Knows
nothing of files, batches or sampling.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flax import nnx
from jax import Array

from jaxinfer.layers.batch_types import LayerContext, StepBatch
from jaxinfer.models.pieces import ParamPieces


class CausalLM(Protocol):
    """A decoder: T tokens in, T hidden states out, logits for the rows that need them."""

    def __call__(
        self, token_ids_T: Array, pages_L: tuple[Array, ...], batch: StepBatch
    ) -> tuple[Array, tuple[Array, ...]]:
        """int32 [T] and each layer's pages -> the last layer's output [T, D] and the new
        pages."""
        ...

    def logits(self, hidden_SD: Array, *, num_rows: Array) -> Array:
        """Rows of that output, [S, D] -> float32 [S, V], split over the mesh by V, which may be
        padded beyond the vocabulary.

        Rows from `num_rows` (int32 scalar) on are padding.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that the runner and the memory plan need, after padding to the mesh."""

    num_layers: int
    num_kv_heads: int  # as laid out on the mesh
    queries_per_kv: int  # query heads of each
    head_dim: int
    vocab_size: int  # true size; logits may have more columns
    max_position_embeddings: int
    checkpoint_dtype: str  # "bfloat16", ... as config.json states it
    kv_source: tuple[int, ...] = ()  # the model's head of each KV head, -1 for a dummy; (): itself


@dataclass(frozen=True, kw_only=True)
class ModelDef:
    """A model of some family, ready to be built: its module is made under `nnx.eval_shape`."""

    shape: ModelShape
    build: Callable[[LayerContext], nnx.Module]  # -> CausalLM
    pieces: ParamPieces
    is_optional: Callable[[str], bool]  # checkpoint tensors that may be left over


class ModelFamily(Protocol):
    """Reads a config.json of its family. Raises CheckpointError on what it does not know."""

    def __call__(self, config: Mapping[str, Any], *, tensor: int) -> ModelDef: ...
