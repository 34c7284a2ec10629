"""Rotary embedding against its definition. (Scaling rules: tests/models, against transformers.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.layers.rope import (
    RopeConfig,
    apply_rope,
    rope_angles,
    rope_from_hf,
    rotate_by_product,
    shared_rope_angles,
)

HEAD_DIM = 8
PLAIN = rope_from_hf({"rope_theta": 100.0}, head_dim=HEAD_DIM)


def rotate(x_TNH: np.ndarray, positions: list[int], config: RopeConfig = PLAIN) -> np.ndarray:
    angles = rope_angles(jnp.asarray(positions, jnp.int32), config)
    return np.asarray(apply_rope(jnp.asarray(x_TNH), angles))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_pairs_are_halves_of_a_head_and_turn_as_complex_numbers():
    x_TNH = normal(3, 2, HEAD_DIM)
    positions = np.array([0, 1, 50])
    z_TNH = x_TNH[..., :4] + 1j * x_TNH[..., 4:]
    turns_TH = positions[:, None] * 100.0 ** -(np.arange(4) / 4)
    expected = z_TNH * np.exp(1j * turns_TH)[:, None]
    found = rotate(x_TNH, positions.tolist())
    np.testing.assert_allclose(found[..., :4] + 1j * found[..., 4:], expected, atol=2e-5)


def test_scores_depend_on_distance_only():
    q, k = normal(1, 1, HEAD_DIM), normal(1, 1, HEAD_DIM)[:, :, ::-1]
    scores = [
        (rotate(q, [query]) * rotate(k, [query - 7])).sum() for query in (7, 100, 4000, 100000)
    ]
    np.testing.assert_allclose(scores, scores[0], atol=2e-2)
    np.testing.assert_allclose(scores[:3], scores[0], atol=1e-3)


@pytest.mark.parametrize("position", [300, 131071])
def test_positions_are_exact_in_bfloat16_models(position: int):
    """The angle is float32 whatever the model's dtype is: bfloat16 counts only to 256."""
    x_TNH = normal(1, 1, HEAD_DIM)
    angles = rope_angles(jnp.asarray([position], jnp.int32), PLAIN)
    found = apply_rope(jnp.asarray(x_TNH, jnp.bfloat16), angles)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), rotate(x_TNH, [position]), atol=0.03)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tpus_product_turns_the_same(dtype: jnp.dtype):
    x = jnp.asarray(normal(5, 3, 2, HEAD_DIM), dtype)
    angles = rope_angles(jnp.arange(5, dtype=jnp.int32), PLAIN)
    found = rotate_by_product(x, angles)
    assert found.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(apply_rope(x, angles), np.float32), rtol=1e-6
    )


def test_the_attention_factor_scales_cosines_and_sines():
    scaled = RopeConfig(inv_freq=PLAIN.inv_freq, attention_factor=1.5)
    x_TNH = normal(2, 1, HEAD_DIM)
    np.testing.assert_allclose(
        rotate(x_TNH, [3, 9], scaled), 1.5 * rotate(x_TNH, [3, 9]), rtol=1e-5, atol=1e-6
    )


def test_layers_share_the_sines_and_do_not_compute_them_again():
    positions_T = jnp.asarray([0, 7, 300, 2], jnp.int32)

    def three_layers(positions_T: jax.Array, x_TNH: jax.Array, w_HH: jax.Array) -> jax.Array:
        angles = shared_rope_angles(positions_T, PLAIN)
        for _ in range(3):
            x_TNH = apply_rope(x_TNH @ w_HH, angles)
        return x_TNH

    args = (positions_T, jnp.asarray(normal(4, 2, HEAD_DIM)), jnp.asarray(normal(8, HEAD_DIM)))
    program = jax.jit(three_layers).lower(*args).compile().as_text()
    assert program is not None
    assert program.count(" cosine(") == program.count(" sine(") == 1
    found, expected = shared_rope_angles(positions_T, PLAIN), rope_angles(positions_T, PLAIN)
    np.testing.assert_allclose(found.cos_TH, expected.cos_TH, rtol=1e-6)
    np.testing.assert_allclose(found.sin_TH, expected.sin_TH, rtol=1e-6, atol=1e-7)
