"""What a step hands to every layer. Knows no models and no scheduler.

T is the number of tokens of the step.
"""

from typing import NamedTuple

from jax import Array
from jax.sharding import Mesh

from pallas_kernels.dispatch import KernelSet
from pallas_kernels.paged_attention.api import AttentionBatch


class StepBatch(NamedTuple):
    """Positions and attention metadata of a step's tokens."""

    positions_T: Array  # int32 [T], 0 for padding
    num_tokens: Array  # int32 scalar: the tokens that are not padding
    attention: AttentionBatch


class LayerContext(NamedTuple):
    """What layers are built with: where they run and which kernels they call."""

    mesh: Mesh
    kernels: KernelSet
    dtype: str  # of weights and activations: "float32", "bfloat16", "float16"
    kv_scales: bool = False  # whether pages hold keys and values divided by a scale of each head
