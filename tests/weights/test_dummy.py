"""Dummy weights: statistics, determinism across shardings, padding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.models.pieces import Piece
from jaxinfer.weights.dummy import dummy_params

SHAPES = {
    "layers.0.mlp.kernel": (64, 128),
    "layers.1.mlp.kernel": (64, 128),
    "layers.0.norm.scale": (64,),
    "layers.0.attention.bias": (64,),
}


def abstract(num_devices: int, dtype=jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("tensor",))
    specs = {2: PartitionSpec(None, "tensor"), 1: PartitionSpec()}
    return {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, specs[len(shape)]))
        for path, shape in SHAPES.items()
    }


def test_values_are_small_and_norms_are_near_one():
    params = dummy_params(abstract(1, jnp.float32), 0)
    kernel = np.asarray(params["layers.0.mlp.kernel"])
    assert abs(kernel.mean()) < 2e-3 and 0.018 < kernel.std() < 0.022
    assert np.unique(kernel).size > 0.95 * kernel.size
    assert abs(np.corrcoef(kernel[:, :-1].ravel(), kernel[:, 1:].ravel())[0, 1]) < 0.05
    assert abs(np.asarray(params["layers.0.norm.scale"]).mean() - 1) < 0.02
    assert abs(np.asarray(params["layers.0.attention.bias"]).mean()) < 0.02
    second = np.asarray(params["layers.1.mlp.kernel"])
    assert abs(np.corrcoef(kernel.ravel(), second.ravel())[0, 1]) < 0.05


def test_the_seed_decides_and_the_sharding_does_not():
    one, four = (dummy_params(abstract(n), 3) for n in (1, 4))
    other = dummy_params(abstract(1), 4)
    for path, target in abstract(4).items():
        assert four[path].sharding == target.sharding and four[path].dtype == target.dtype
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(four[path]))
        assert (np.asarray(one[path]) != np.asarray(other[path])).any()


def test_what_no_piece_covers_is_zero():
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    target = {"heads": jax.ShapeDtypeStruct((5, 4, 8), jnp.float32, sharding=sharding)}
    regions = [(slice(3), 1), (slice(None), 3, slice(2, 6))]
    pieces = {
        "heads": tuple(
            Piece(name="q", shape=(1,), arrange=lambda array: array, region=region)
            for region in regions
        )
    }
    values = np.asarray(dummy_params(target, 0, pieces=pieces)["heads"])
    expected = np.zeros((5, 4, 8), bool)
    for region in regions:
        expected[region] = True
    np.testing.assert_array_equal(values != 0, expected)
