"""Single layers, on one device and on four: what they compute does not depend on sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer.layers.batch_types import LayerContext
from jaxinfer.layers.einsum import Einsum
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.parallel.mesh import make_mesh
from pallas_kernels.dispatch import choose_kernels


def context(num_devices: int, dtype: str = "float32") -> LayerContext:
    mesh = make_mesh(tensor=num_devices, devices=jax.devices())
    return LayerContext(mesh=mesh, kernels=choose_kernels(platform="cpu"), dtype=dtype)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fill(parameter: nnx.Param | None, values: np.ndarray) -> None:
    assert parameter is not None
    assert parameter.get_value().shape == values.shape
    parameter.set_value(jnp.asarray(values, parameter.get_value().dtype))


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize(
    ("equation", "bias"), [("TD,DKRH->TKRH", "KRH"), ("TKGH,KGHD->TD", "D"), ("TD,DUF->TUF", None)]
)
def test_einsum(num_devices: int, equation: str, bias: str | None):
    dims = {"T": 5, "D": 6, "K": 4, "R": 3, "G": 3, "H": 2, "U": 2, "F": 8}
    layer = Einsum(context(num_devices), equation, bias=bias, **dims)
    x, kernel = (
        normal(*(dims[letter] for letter in letters), seed=seed)
        for seed, letters in enumerate(equation.split("->")[0].split(","))
    )
    fill(layer.kernel, kernel)
    expected = np.einsum(equation, x, kernel)
    if bias:
        offset = normal(*(dims[letter] for letter in bias), seed=3)
        fill(layer.bias, offset)
        expected = expected + offset
    out = jax.jit(layer)(x, num_rows=np.int32(len(x)))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", ["TD,KDH->TKH", "TKH,HKD->TD", "TD,DKH->TKH D"])
def test_einsum_wants_the_contracted_dimensions_first(equation: str):
    with pytest.raises(ValueError, match="contract the last of x with the first of kernel"):
        Einsum(context(1), equation, D=2, K=2, H=2)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_embedding_and_its_use_as_the_head(num_devices: int):
    layer = Embedding(context(num_devices), V=12, D=5)
    table_VD = normal(12, 5)
    fill(layer.table, table_VD)
    ids_T = np.array([0, 2, 3, 11, 6, 0], np.int32)
    np.testing.assert_array_equal(jax.jit(layer)(ids_T), table_VD[ids_T])
    x_SD = normal(3, 5, seed=1)
    logits_SV = jax.jit(layer.attend)(x_SD, num_rows=np.int32(len(x_SD)))
    np.testing.assert_allclose(logits_SV, x_SD @ table_VD.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-7), ("float16", 2**-10)]
)
def test_rms_norm_has_its_statistics_in_float32(dtype: str, tolerance: float):
    layer = RMSNorm(context(1, dtype), "D", eps=1e-5, D=64)
    scale_D, x_TD = normal(64), 300.0 * normal(4, 64, seed=1)  # squares beyond float16
    fill(layer.scale, scale_D)
    x_TD = jnp.asarray(x_TD, dtype)
    exact = np.asarray(x_TD, np.float64)
    exact = exact / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-5) * scale_D
    found_TD = layer(x_TD)
    assert found_TD.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(found_TD, np.float64), exact, atol=tolerance, rtol=tolerance
    )
