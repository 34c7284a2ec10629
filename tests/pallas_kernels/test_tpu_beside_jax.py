"""The TPU kernels beside JAX's own ragged paged attention: same inputs, same answers.

JAX's operation reads a cache that has the step's tokens already, in another layout. Neither of
Pallas's interpreters can run its kernel in JAX 0.10.2 (the simulated TPU knows no reshaped
references, the plain one no typed indices), so it is the reference that JAX holds its kernel to.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from tests.pallas_kernels.ragged import Sequence, make_step
from tests.pallas_kernels.test_tpu_paged_attention import CASES, compiled
from tests.tolerances import ATTENTION


@pytest.mark.slow
def test_same_answers_as_jax():
    name = "chunks-as-jax"
    shapes, spec, _, _, _, _ = CASES[name]
    found = [Sequence(31, 1), Sequence(250, 1), Sequence(0, 20), Sequence(100, 33)]
    step = make_step(found, shapes, spec, seed=0)
    num_tokens = int(step.layout.query_starts_S1[-1])
    ours, pages = compiled(name)(step.layout, step.q_TKGH, step.k_TKH, step.v_TKH, step.pages_PKBC)
    pages_PBKC = np.asarray(pages).transpose(0, 2, 1, 3)
    lengths_S = np.zeros(shapes.S, np.int32)
    lengths_S[: len(found)] = [sequence.length for sequence in found]
    with jax.numpy_dtype_promotion("standard"):
        theirs = ref_ragged_paged_attention(
            jnp.asarray(step.q_TKGH.reshape(shapes.T, -1, shapes.H)),
            # Keys and values of a head are neighbours there too, each a row.
            jnp.asarray(pages_PBKC.reshape(shapes.P, shapes.B, 2 * shapes.K, shapes.H)),
            jnp.asarray(lengths_S),
            jnp.asarray(step.layout.page_table_RM[step.layout.slots_S]),
            jnp.asarray(step.layout.query_starts_S1),
            jnp.asarray(step.layout.num_seqs)[None],
            sm_scale=spec.scale,
            sliding_window=spec.window,
            soft_cap=spec.soft_cap,
        )
    theirs_TNH = np.asarray(theirs)[:num_tokens]
    ours_TNH = np.asarray(ours)[:num_tokens].reshape(theirs_TNH.shape)
    tolerance = ATTENTION["float32"]
    np.testing.assert_allclose(
        ours_TNH, theirs_TNH, rtol=2 * tolerance.relative, atol=2 * tolerance.absolute
    )
