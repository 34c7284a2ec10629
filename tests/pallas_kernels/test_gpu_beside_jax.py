"""The GPU kernels of decodes beside JAX's own paged attention: same inputs, same answers.

JAX's operation (Triton) reads keys and values from caches of their own that have the step's tokens
already, and leaves the scale of the queries to its caller. Both run in Pallas's interpreter.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

from pallas_kernels.paged_attention.api import AttentionSpec
from tests.pallas_kernels.gpu_cases import compile_case
from tests.pallas_kernels.ragged import Sequence, make_step
from tests.pallas_kernels.test_gpu_triton import decodes
from tests.tolerances import ATTENTION


def test_same_answers_as_jax():
    case = decodes(AttentionSpec(scale=0.2, soft_cap=2.0), H=32, M=16, P=60)
    shapes = case.shapes
    found = [Sequence(15, 1), Sequence(16, 1), Sequence(230, 1), Sequence(0, 1), Sequence(77, 1)]
    step = make_step(found, shapes, case.spec, seed=0)
    ours, pages = compile_case(case)(
        step.layout, step.q_TKGH, step.k_TKH, step.v_TKH, step.pages_PKBC
    )
    pages_KPBC = jnp.asarray(np.nan_to_num(np.asarray(pages)).swapaxes(0, 1))  # (poison is ours)
    with jax.numpy_dtype_promotion("standard"):
        theirs = paged_attention(
            jnp.asarray(step.q_TKGH.reshape(shapes.T, -1, shapes.H)) * case.spec.scale,
            pages_KPBC[..., : shapes.H],
            pages_KPBC[..., shapes.H :],
            jnp.asarray(step.layout.page_table_RM[step.layout.slots_S]),
            jnp.asarray([sequence.length for sequence in found], jnp.int32),
            pages_per_compute_block=4,
            k_splits=2,
            attn_logits_soft_cap=case.spec.soft_cap,
            interpret=True,
        )
    tolerance = ATTENTION["float32"]
    np.testing.assert_allclose(
        np.asarray(ours).reshape(theirs.shape),
        np.asarray(theirs),
        rtol=2 * tolerance.relative,
        atol=2 * tolerance.absolute,
    )
