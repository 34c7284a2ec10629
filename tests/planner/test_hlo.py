"""Collectives read from compiled programs: from lines as compilers write them, and a real one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.planner.hlo import Collective, collectives_of

TPU = """\
HloModule jit_step

%branch.1 (p: f32[4]) -> f32[8] {
  %g = f32[8]{0:T(256)S(1)} all-gather(%p), replica_groups=mesh['a'=1,'b'=8] {'b'}, dimensions={0}
}

%fused.2 (p: bf16[2,4]) -> bf16[2,4] {
  %r = bf16[2,4]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}
}

ENTRY %main (p: bf16[2,4]) -> bf16[2,4] {
  %f = bf16[2,4] fusion(%p), kind=kOutput, calls=%fused.2
  %c = f32[8] conditional(%i, %a, %b), branch_computations={%branch.1, %branch.0}
  %s = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%f), replica_groups=[1,8]<=[8]
  %d = bf16[16,4] all-gather-done(%s)
}
"""


def test_lines_of_the_compilers():
    assert collectives_of(TPU) == (
        Collective(kind="all-gather", num_bytes=32, group_size=8, always=False),
        Collective(kind="all-reduce", num_bytes=16, group_size=4, always=True),
        Collective(kind="all-gather", num_bytes=128, group_size=8, always=True),
    )


@pytest.mark.parametrize("num_devices", [2, 4])
def test_a_real_program(num_devices: int):
    mesh = make_mesh(tensor=num_devices, devices=jax.devices())  # type: ignore[arg-type]
    whole = NamedSharding(mesh, PartitionSpec())

    def spread(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x @ y, whole)

    args = spread((16, 64), None, "tensor"), spread((64, 32), "tensor", None)
    (found,) = collectives_of(jax.jit(product).lower(*args).compile().as_text() or "")
    assert found == Collective(
        kind="all-reduce", num_bytes=16 * 32 * 4, group_size=num_devices, always=True
    )
