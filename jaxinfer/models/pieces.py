"""How a checkpoint's tensors make up the parameters: data, no reading, no devices.

A parameter is assembled from *pieces*. Each piece names one checkpoint tensor (Hugging Face
naming), the shape it must have, how it is rearranged, and the region of the parameter it fills.
What no piece covers is zero: padding that makes a dimension divisible by the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Region = tuple[slice | int, ...]
Arrange = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One checkpoint tensor's part in a parameter."""

    name: str  # checkpoint tensor, Hugging Face naming
    shape: tuple[int, ...]  # the shape it must have there
    arrange: Arrange  # checkpoint array -> array of the region's shape (a view where possible)
    region: Region = ()  # where it goes; () is the whole parameter


ParamPieces = dict[str, tuple[Piece, ...]]
"""Parameter path ("layers.0.attention.qkv") -> its pieces. A tensor may serve two parameters."""
