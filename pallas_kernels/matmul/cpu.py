"""Products with weights on CPUs in C++ (native/matmul.cc), called through XLA's FFI.

The weight is stored for the product when it is loaded: in panels of columns, as float32 or as
bfloat16. Sums are float32 either way, so a bfloat16 checkpoint loses nothing and costs half the
memory traffic. Rows beyond those in use cost next to nothing, which lets a step be compiled for
few sizes.

Letters: M rows, K depth (contracted), N columns.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

StoredDType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class PanelMatmul:
    """A weight format and its product. Hashable: it is part of a model's static description."""

    target: str  # the C++ function's name in XLA
    panel: int  # columns of a panel
    dtype: StoredDType

    def fits(self, depth: int) -> bool:
        """Pairs of bfloat16 need an even depth."""
        return self.dtype == "float32" or depth % 2 == 0

    def stored(self, *, depth: int, num_columns: int) -> jax.ShapeDtypeStruct:
        """Shape and type of a stored weight [depth, num_columns]."""
        num_panels = -(-num_columns // self.panel)
        if self.dtype == "float32":
            return jax.ShapeDtypeStruct((num_panels, depth, self.panel), jnp.float32)
        # As bits: XLA:CPU must not touch 16-bit floats, which it widens a whole array at a time.
        return jax.ShapeDtypeStruct((num_panels, depth // 2, self.panel, 2), jnp.uint16)

    def pack(self, matrix_KN: np.ndarray) -> np.ndarray:
        """A weight as it is stored; rounds to the stored type."""
        depth, num_columns = matrix_KN.shape
        stored = self.stored(depth=depth, num_columns=num_columns)
        num_panels = stored.shape[0]
        if self.dtype == "float32":
            values, rows = matrix_KN.astype(np.float32, copy=False), (depth,)
        else:
            values = matrix_KN.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16)
            rows = (depth // 2, 2)
        padded = np.zeros((depth, num_panels * self.panel), values.dtype)
        padded[:, :num_columns] = values
        split = padded.reshape(*rows, num_panels, self.panel)
        order = (1, 0, 2) if self.dtype == "float32" else (2, 0, 3, 1)
        return np.ascontiguousarray(split.transpose(order))

    def columns(self, stored: Array, ids_T: Array) -> Array:
        """Columns of the weight as rows, float32 [T, K]."""
        found = stored[ids_T // self.panel, :, ids_T % self.panel]  # [T, K] or [T, K/2, 2]
        if self.dtype == "float32":
            return found
        bits_TK = found.reshape(found.shape[0], -1).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits_TK, jnp.float32)

    def __call__(self, x_MK: Array, stored: Array, *, num_columns: int, num_rows: Array) -> Array:
        """float32 [M, K] times the weight -> float32 [M, N]; rows from `num_rows` on are zero.

        `num_rows`: int32 scalar.
        """
        call = jax.ffi.ffi_call(
            self.target, jax.ShapeDtypeStruct((x_MK.shape[0], num_columns), jnp.float32)
        )
        return call(x_MK, stored, num_rows)
