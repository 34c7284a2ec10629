"""Log-probabilities against log-softmax in float64, and prompt ones against whole-step ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.sampling.logprobs import prompt_logprobs, token_logprobs, unpack_logprobs

_packed_token_logprobs = jax.jit(token_logprobs, static_argnames=("vocab_size", "mesh", "num_top"))


def _token_logprobs(*args, **kwargs):
    mesh = make_mesh(tensor=1, devices=jax.devices())
    return unpack_logprobs(np.asarray(_packed_token_logprobs(*args, mesh=mesh, **kwargs)))


def _reference(logits_NV: np.ndarray, token_N: np.ndarray, num_top: int):
    exact_NV = logits_NV.astype(np.float64)
    exact_NV = exact_NV - exact_NV.max(axis=1, keepdims=True)
    logprobs_NV = exact_NV - np.log(np.exp(exact_NV).sum(axis=1, keepdims=True))
    own_N = np.take_along_axis(logprobs_NV, token_N[:, None], axis=1)
    rank_N = (logprobs_NV > own_N).sum(axis=1) + 1
    ids_NK = np.argsort(-logits_NV, axis=1, kind="stable")[:, :num_top]
    return own_N[:, 0], rank_N, ids_NK, np.take_along_axis(logprobs_NV, ids_NK, axis=1)


def _assert_matches(result, expected) -> None:
    np.testing.assert_allclose(result.token_logprob_N, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.rank_N, expected[1])
    np.testing.assert_array_equal(result.top_ids_NK, expected[2])
    np.testing.assert_allclose(result.top_logprobs_NK, expected[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("vocab_size", "width"), [(1000, 1000), (1000, 1024), (5000, 5001)])
def test_matches_log_softmax(vocab_size, width):
    rng = np.random.default_rng(0)
    logits_SV = rng.normal(size=(5, width)).astype(np.float32) * 8
    logits_SV[1] += 500  # far from zero: must not overflow
    logits_SV[2] = np.round(logits_SV[2])  # ties
    logits_SV[3, ::2] = -np.inf
    logits_SV[:, vocab_size:] = 999.0  # padding
    token_S = np.array([0, 7, vocab_size - 1, 1, int(np.argmax(logits_SV[4, :vocab_size]))])
    with jax.numpy_dtype_promotion("strict"):
        result = _token_logprobs(
            jnp.asarray(logits_SV),
            jnp.asarray(token_S, jnp.int32),
            jnp.array([False, True, False, False, False]),
            vocab_size=vocab_size,
        )
    _assert_matches(result, _reference(logits_SV[:, :vocab_size], token_S, 20))


def test_a_forbidden_token_has_minus_infinity_and_the_last_rank():
    logits_SV = np.array([[0.0, -np.inf, 1.0]], np.float32)
    result = _token_logprobs(
        jnp.asarray(logits_SV), jnp.array([1], jnp.int32), jnp.array([True]), vocab_size=3
    )
    assert result.token_logprob_N.tolist() == [-np.inf]
    assert result.rank_N.tolist() == [3]
    assert result.top_ids_NK.tolist() == [[2, 0, 1]]


def test_nothing_is_computed_when_nobody_asks():
    result = _token_logprobs(
        jnp.full((2, 64), jnp.nan), jnp.zeros(2, jnp.int32), jnp.zeros(2, bool), vocab_size=64
    )
    assert not any(np.any(leaf) for leaf in result)


@pytest.mark.parametrize("num_tokens", [1, 64, 150])
def test_prompt_logprobs_in_chunks(num_tokens):
    rng = np.random.default_rng(1)
    hidden_TD = rng.normal(size=(num_tokens, 8)).astype(np.float32)
    head_DV = rng.normal(size=(8, 130)).astype(np.float32)
    target_T = rng.integers(0, 120, num_tokens)
    wanted_T = np.zeros(num_tokens, bool)
    wanted_T[-1] = True

    @jax.jit
    def run(hidden_TD, target_T, wanted_T):
        return prompt_logprobs(
            hidden_TD,
            target_T,
            wanted_T,
            logits_of=partial(jnp.matmul, b=head_DV),
            vocab_size=120,
            mesh=make_mesh(tensor=1, devices=jax.devices()),
        )

    with jax.numpy_dtype_promotion("strict"):
        packed_TW = run(
            jnp.asarray(hidden_TD), jnp.asarray(target_T, jnp.int32), jnp.asarray(wanted_T)
        )
    result = unpack_logprobs(np.asarray(packed_TW))
    begin = (num_tokens - 1) // 64 * 64  # earlier chunks are skipped
    expected = _reference((hidden_TD @ head_DV)[begin:, :120], target_T[begin:], 20)
    _assert_matches(type(result)(*(leaf[begin:] for leaf in result)), expected)
    assert not any(np.any(leaf[:begin]) for leaf in result)
