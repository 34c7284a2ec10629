"""Which mesh axis a logical dimension is split over: one table, by the letters of docs/glossary.md.

Shapes in einsum strings use these letters, so a layer's layout and its sharding are one
declaration. Knows no layers and no models.
"""

from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import Mesh, NamedSharding, PartitionSpec

TENSOR_AXIS = "tensor"

RULES: Mapping[str, str] = MappingProxyType(
    {
        "K": TENSOR_AXIS,  # KV heads, and the query heads that belong to each
        "F": TENSOR_AXIS,  # hidden width of the MLP
        "V": TENSOR_AXIS,  # vocabulary
    }
)
"""Letters that are not here (T, D, H, ...) are whole on every device."""


def spec_of(letters: str) -> PartitionSpec:
    """The partition spec of an array whose dimensions have these letters.

    `spec_of("DKRH") == PartitionSpec(None, "tensor", None, None)`
    """
    return PartitionSpec(*(RULES.get(letter) for letter in letters))


def sharding_of(mesh: Mesh, letters: str) -> NamedSharding:
    """`spec_of` on a mesh."""
    return NamedSharding(mesh, spec_of(letters))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
