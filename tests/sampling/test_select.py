"""Filters and draws against a sorting reference (itself against transformers), and the CDF."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.sampling.params import pack_sampling, step_words, unpack_sampling
from jaxinfer.sampling.select import _argmax, _multiply_high, argmax_tokens, draw_tokens, top_tokens
from tests.sampling.warpers import Filters, kept_tokens

_NUM_POINTS = 1024
_V = 300  # two blocks, the last one not full
_top_tokens = jax.jit(top_tokens, static_argnums=1)


def _batch(filters: Filters, num: int):
    row_W = pack_sampling(SamplingParams(**filters._asdict()), default_seed=0)
    words_SW = step_words(
        row_W[None],
        slots_S=np.zeros(num, np.int32),
        output_indices_S=np.arange(num),
        samples_S=np.ones(num, bool),
    )
    return unpack_sampling(jnp.asarray(words_SW))


# Sixty examples of 1024 rows run longer than they compile.
@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
def _draw_row(logits_V, batch, bits_S):
    logits_SV = jnp.broadcast_to(logits_V, (bits_S.shape[0], logits_V.shape[0]))
    return draw_tokens(logits_SV, argmax_tokens(logits_SV), batch, bits_S)


def _draw_at_grid(logits_V: np.ndarray, filters: Filters, num: int = _NUM_POINTS) -> np.ndarray:
    """Tokens at evenly spaced random words, the two ends included."""
    bits_S = np.linspace(0, 2**32 - 1, num).astype(np.uint64).astype(np.uint32)
    with jax.numpy_dtype_promotion("strict"):
        tokens_S = _draw_row(
            jnp.asarray(logits_V, jnp.float32), _batch(filters, num), jnp.asarray(bits_S)
        )
    return np.asarray(tokens_S)


def _reference_probs(logits_V: np.ndarray, filters: Filters) -> np.ndarray:
    """The filters in vLLM's order, float64; tokens equal to the least kept one stay."""
    scores_V = logits_V.astype(np.float64)
    kept_V = kept_tokens(logits_V, filters)
    kept_V = logits_V >= logits_V[kept_V].min()
    weight_V = np.where(kept_V, np.exp((scores_V - scores_V.max()) / filters.temperature), 0.0)
    return weight_V / weight_V.sum()


def _tied_logits(seed: int) -> np.ndarray:
    """Logits on a grid of 1/4: ties are frequent and exact, other gaps wide. Some are extreme."""
    rng = np.random.default_rng(seed)
    logits_V = rng.integers(-80, rng.integers(-60, 40), size=_V).astype(np.float32) / 4
    extreme = rng.choice([-np.inf, -3.4e38, 3.4e38], size=_V, p=[0.6, 0.399, 0.001])
    is_extreme_V = rng.random(_V) < rng.choice([0.0, 0.3, 0.95])
    return np.where(is_extreme_V, extreme, logits_V).astype(np.float32)


_logits = st.integers(0, 2**32).map(_tied_logits)
_filters = st.builds(
    Filters,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, -1, 1, 2, 7, 50, 299, 300, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.503, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.03, 0.2, 1.0]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(logits_V=_logits, filters=_filters)
def test_the_reference_is_transformers(logits_V, filters):
    torch = pytest.importorskip("torch")
    import transformers

    warpers = transformers.LogitsProcessorList(
        [transformers.TemperatureLogitsWarper(filters.temperature)]
    )
    if filters.min_p > 0:
        warpers.append(transformers.MinPLogitsWarper(filters.min_p))
    if 0 < filters.top_k < logits_V.size:
        warpers.append(transformers.TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(filters.top_p))
    scores_V = torch.from_numpy(logits_V.astype(np.float64))
    kept_V = np.isfinite(warpers(torch.LongTensor([[0]]), scores_V[None])[0].numpy())
    least = logits_V[kept_V].min()
    assert least == logits_V[kept_tokens(logits_V, filters)].min()  # which of equals stays may vary


@settings(max_examples=60, deadline=None, derandomize=True)
@given(logits_V=_logits, filters=_filters)
@example(logits_V=np.zeros(_V, np.float32), filters=Filters(top_k=3))
@example(logits_V=np.zeros(_V, np.float32), filters=Filters(top_p=0.1))
def test_inverse_cdf_matches_the_warpers(logits_V, filters):
    probs_V = _reference_probs(logits_V, filters)
    tokens_S = _draw_at_grid(logits_V, filters)

    assert np.all(probs_V[tokens_S] > 0)
    # Tokens come in the order of their ids, each for its share of the grid, to within one point.
    assert np.all(np.diff(tokens_S) >= 0)
    counts_V = np.bincount(tokens_S, minlength=_V)
    np.testing.assert_allclose(
        np.cumsum(counts_V) / _NUM_POINTS, np.cumsum(probs_V), atol=1.01 / _NUM_POINTS
    )


@pytest.mark.parametrize(
    "filters",
    [
        Filters(),
        Filters(temperature=0.7, top_k=11),
        Filters(top_p=0.9),
        Filters(temperature=1.3, top_k=30, top_p=0.8),
        Filters(min_p=0.1),
    ],
)
def test_kept_set_on_continuous_logits(filters):
    """On logits without ties the set of tokens that can come is exactly the warpers' set."""
    logits_V = np.full(_V, -np.inf, np.float32)
    logits_V[::7] = np.random.default_rng(1).normal(size=len(logits_V[::7]))
    probs_V = _reference_probs(logits_V, filters)
    assert probs_V[probs_V > 0].min() > 1 / _NUM_POINTS
    tokens_S = _draw_at_grid(logits_V, filters)
    assert set(tokens_S.tolist()) == set(np.flatnonzero(probs_V).tolist())


@pytest.mark.parametrize("vocab_size", [1, 128, 49_152, 131_072])
def test_ends_of_the_random_range(vocab_size):
    """u = 0 and u = 1 - 2**-32 give the first and the last token that has mass."""
    logits_V = np.full(vocab_size, -np.inf, np.float32)
    first, last = vocab_size // 3, vocab_size - 1 - vocab_size // 5
    logits_V[first : last + 1] = 0.0
    for filters in (Filters(), Filters(top_p=0.99999), Filters(top_k=vocab_size)):
        tokens_S = _draw_at_grid(logits_V, filters, num=2)
        assert tokens_S.tolist() == [first, last]


def test_rare_tokens_keep_their_probability():
    """A token of probability 1e-6 behind 131,071 others is drawn for 1e-6 of the random words."""
    logits_V = np.full(131_072, -30.0, np.float32)
    logits_V[0], logits_V[-1] = 0.0, np.log(1e-6)
    share = 1e-6 / (1 + 1e-6 + 131_070 * np.exp(-30.0))
    for distance, expected in ((0.9, 131_071), (1.1, 0)):
        bits_S = np.full(2, 2**32 - 1 - int(distance * share * 2**32), np.uint32)
        token_S = _draw_row(jnp.asarray(logits_V), _batch(Filters(), 2), jnp.asarray(bits_S))
        assert token_S.tolist() == [expected, expected]


@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8),
    total=st.integers(0, 2**31 - 1),
)
@settings(max_examples=50, deadline=None, derandomize=True)
@example(bits=[2**32 - 1] * 8, total=2**31 - 1)
def test_multiply_high_is_exact(bits, total):
    result_S = _multiply_high(jnp.array(bits, jnp.uint32), jnp.full((8,), total, jnp.int32))
    assert result_S.tolist() == [word * total >> 32 for word in bits]


# What a CPU does, and what the others do.
_argmaxes = pytest.mark.parametrize("argmax", [argmax_tokens, _argmax])


@_argmaxes
@settings(max_examples=50, deadline=None, derandomize=True)
@given(logits_V=_logits)
def test_argmax_takes_the_lowest_id_of_equals(argmax, logits_V):
    logits_SV = np.stack([logits_V, logits_V[::-1]])
    best = argmax(jnp.asarray(logits_SV))
    assert best.token_S.tolist() == np.argmax(logits_SV, axis=1).tolist()
    assert best.logit_S.tolist() == logits_SV.max(axis=1).tolist()


@_argmaxes
@pytest.mark.parametrize("position", [0, 1, 127, 128, 255, 298, 299])
def test_argmax_shows_a_nan_anywhere(argmax, position):
    logits_SV = np.zeros((2, _V), np.float32)
    logits_SV[0, position] = np.nan
    best = argmax(jnp.asarray(logits_SV))
    assert np.isnan(best.logit_S[0])
    assert best.logit_S[1] == 0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(logits_V=_logits, num=st.sampled_from([1, 5, 20]))
@example(logits_V=np.full(_V, -np.inf, np.float32), num=20)
@example(logits_V=np.arange(_V, dtype=np.float32), num=20)
def test_top_tokens_matches_a_stable_sort(logits_V, num):
    id_SK = _top_tokens(jnp.asarray(logits_V)[None], num)
    assert id_SK[0].tolist() == np.argsort(-logits_V, kind="stable")[:num].tolist()
