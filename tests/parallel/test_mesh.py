"""The mesh and the rules that lay arrays out on it."""

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxinfer.errors import ConfigError
from jaxinfer.parallel.mesh import AXES, make_mesh
from jaxinfer.parallel.rules import replicated, sharding_of, spec_of


@pytest.mark.parametrize("tensor", [1, 4, 8])
def test_a_mesh_has_all_axes(tensor: int):
    mesh = make_mesh(tensor=tensor, devices=jax.devices())
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 1, "pipe": 1, "expert": 1, "tensor": tensor}


def test_more_devices_than_there_are():
    with pytest.raises(ConfigError, match="--tensor-parallel-size 9 needs 9 devices.* are 8"):
        make_mesh(tensor=9, devices=jax.devices())


def test_letters_say_what_is_split():
    assert spec_of("DKRH") == PartitionSpec(None, "tensor", None, None)
    assert spec_of("DUF") == PartitionSpec(None, None, "tensor")
    assert spec_of("TD") == PartitionSpec(None, None)
    mesh = make_mesh(tensor=4, devices=jax.devices())
    assert sharding_of(mesh, "PKBC").shard_shape((3, 8, 16, 64)) == (3, 2, 16, 64)
    assert replicated(mesh).shard_shape((3, 8)) == (3, 8)
