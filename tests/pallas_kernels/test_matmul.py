"""The C++ product against numpy: types, tiles and their edges, padding rows, columns looked up."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.config.env import cache_dir
from pallas_kernels.matmul.cpu import PanelMatmul, StoredDType
from pallas_kernels.native.library import load_native_kernels

SHAPES = [  # rows, depth, columns: one row; a tile and its edges; several passes over depth; blocks
    (1, 64, 96),
    (3, 6, 5),
    (6, 32, 33),
    (7, 130, 17),
    (29, 2 * 2048 + 6, 40),
    (200, 320, 72),
    (64, 48, 1031),
]


# The code for AVX-512 with products of bfloat16 pairs, in plain C++.
WIDE = ("JAXINFER_WIDE_VECTORS", "JAXINFER_EMULATE_PAIRS")


def kernel(dtype: StoredDType, macros: tuple[str, ...] = ()) -> PanelMatmul:
    native = load_native_kernels(
        cache_dir() / "native", head_dim=32, page_dtype="float32", macros=macros
    )
    if native.matmul is None:
        pytest.skip(native.matmul_reason)
    return PanelMatmul(target=native.matmul.target, panel=native.matmul.panel, dtype=dtype)


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tolerance(matmul: PanelMatmul) -> float:
    """Processors with products of bfloat16 pairs round x as well."""
    has_pairs = matmul.panel == 32 and matmul.dtype == "bfloat16"
    return 2e-2 if has_pairs else 3e-6


@pytest.mark.parametrize("macros", [(), WIDE], ids=["this processor", "wide"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_product(rows: int, depth: int, columns: int, dtype: StoredDType, macros: tuple[str, ...]):
    matmul = kernel(dtype, macros)
    x, weight = normal(rows, depth, seed=0), normal(depth, columns, seed=1)
    rounded = weight.astype(ml_dtypes.bfloat16).astype(np.float64)
    exact = x.astype(np.float64) @ (rounded if dtype == "bfloat16" else weight)
    stored = jnp.asarray(matmul.pack(weight))
    assert (stored.shape, stored.dtype) == (
        matmul.stored(depth=depth, num_columns=columns).shape,
        matmul.stored(depth=depth, num_columns=columns).dtype,
    )
    product = jax.jit(lambda x, w, n: matmul(x, w, num_columns=columns, num_rows=n))
    out = product(x, stored, np.int32(rows))
    atol = tolerance(matmul) * 3 * np.sqrt(depth)
    np.testing.assert_allclose(out, exact, rtol=0, atol=atol)
    if matmul.panel == 32 and dtype == "bfloat16":  # x rounded by hand: nothing else is lost
        exact = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ rounded
        np.testing.assert_allclose(out, exact, rtol=0, atol=3e-6 * 3 * np.sqrt(depth))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [0, 1, 8, 20])
def test_rows_beyond_those_in_use_are_zero_and_their_input_is_not_read(
    num_rows: int, dtype: StoredDType
):
    matmul = kernel(dtype)
    x, weight = normal(20, 16, seed=0), normal(16, 50, seed=1)
    expected = x @ weight
    x[num_rows:] = np.nan
    out = np.asarray(
        matmul(
            jnp.asarray(x),
            jnp.asarray(matmul.pack(weight)),
            num_columns=50,
            num_rows=jnp.int32(num_rows),
        )
    )
    np.testing.assert_allclose(out[:num_rows], expected[:num_rows], atol=0.1)
    assert not out[num_rows:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_columns_are_those_of_the_weight(dtype: StoredDType):
    matmul = kernel(dtype)
    weight = normal(10, 77, seed=2).astype(ml_dtypes.bfloat16).astype(np.float32)
    ids = np.array([0, 76, 33, 15, 16, 33], np.int32)
    found = matmul.columns(jnp.asarray(matmul.pack(weight)), jnp.asarray(ids))
    np.testing.assert_array_equal(found, weight.T[ids])


def test_infinities_and_nan_pass_through():
    matmul = kernel("bfloat16")
    x = np.ones((2, 4), np.float32)
    x[1, 2] = np.inf
    weight = np.ones((4, 3), np.float32)
    weight[0, 1] = np.nan
    out = np.asarray(
        matmul(
            jnp.asarray(x), jnp.asarray(matmul.pack(weight)), num_columns=3, num_rows=jnp.int32(2)
        )
    )
    np.testing.assert_array_equal(out, [[4, np.nan, 4], [np.inf, np.nan, np.inf]])


def test_an_odd_depth_has_no_pairs():
    assert kernel("float32").fits(7) and kernel("bfloat16").fits(8)
    assert not kernel("bfloat16").fits(7)


def test_a_weight_of_another_shape_is_refused():
    matmul = kernel("float32")
    stored = jnp.asarray(matmul.pack(normal(8, 20, seed=0)))
    with pytest.raises(Exception, match="not laid out for this product"):
        matmul(jnp.ones((1, 6)), stored, num_columns=20, num_rows=jnp.int32(1)).block_until_ready()
