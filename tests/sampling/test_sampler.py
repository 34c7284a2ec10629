"""The whole sampler: mixed batches, seeds, slots, resuming, broken rows, the right distribution."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.sampling.state import advance, init_state
from tests.sampling.helpers import Sampler, Seq

_V = 300
_GREEDY = SamplingParams(temperature=0.0)
_PENALTIES = SamplingParams(
    temperature=0.8, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.2, seed=3
)


def _logits(num: int, seed: int = 0, vocab_size: int = _V) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, vocab_size)).astype(np.float32) * 3


_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "num_seqs", [1, pytest.param(4, marks=_SLOW), pytest.param(16, marks=_SLOW), 17,
                 pytest.param(40, marks=_SLOW)]
)  # fmt: skip
def test_greedy_is_argmax_beside_random_rows(num_seqs):
    """Beyond 16 rows the sampler works in chunks; 17 and 40 leave the last one not full."""
    logits_SV = _logits(num_seqs)
    sampler = Sampler(vocab_size=_V)
    for other in (_GREEDY, SamplingParams(top_p=0.9, top_k=9), SamplingParams(logit_bias={0: 9.0})):
        if other.logit_bias:
            sampler.admit(0, other)
        seqs = [Seq(_GREEDY if slot else other, slot=slot) for slot in range(num_seqs)]
        result = sampler.step(logits_SV, seqs)
        assert result.token[1:] == np.argmax(logits_SV, axis=1).tolist()[1:]
        assert all(result.ok)


def test_padding_is_never_sampled():
    logits_SV = _logits(4, vocab_size=_V + 20)
    logits_SV[:, _V:] = 1000.0
    sampler = Sampler(vocab_size=_V)
    settings = (_GREEDY, SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.5))
    result = sampler.step(logits_SV, [Seq(p, slot=i) for i, p in enumerate(settings)])
    assert max(result.token) < _V
    assert result.token[0] == np.argmax(logits_SV[0, :_V])


def _draws(params: SamplingParams, logits_V: np.ndarray, num_steps: int) -> np.ndarray:
    num_seqs = 64
    sampler = Sampler(vocab_size=logits_V.size)
    logits_SV = np.tile(logits_V, (num_seqs, 1))
    tokens = [
        sampler.step(logits_SV, [Seq(params, slot=s, output_index=step, default_seed=s)
                                 for s in range(num_seqs)]).token
        for step in range(num_steps)
    ]  # fmt: skip
    return np.array(tokens)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=12)])
def test_draws_follow_the_distribution(params):
    """Chi-square over 6,400 draws with fixed seeds; 64 seeds times 100 positions."""
    logits_V = np.random.default_rng(5).normal(size=24).astype(np.float32)
    tokens = _draws(params, logits_V, 100).ravel()
    weight_V = np.exp(logits_V / params.temperature)
    if params.top_k > 0:
        weight_V[np.argsort(logits_V)[: -params.top_k]] = 0.0
    expected_V = tokens.size * weight_V / weight_V.sum()
    counts_V = np.bincount(tokens, minlength=24)
    assert (counts_V[expected_V == 0] == 0).all()
    kept_V = expected_V > 0
    chi2 = ((counts_V - expected_V)[kept_V] ** 2 / expected_V[kept_V]).sum()
    degrees = kept_V.sum() - 1
    assert abs(chi2 - degrees) < 4 * np.sqrt(2 * degrees)


def test_draws_of_one_seed_are_not_correlated():
    tokens = _draws(SamplingParams(), np.zeros(16, np.float32), 100).astype(np.float64)
    tokens -= tokens.mean()
    for shifted in (tokens[1:] * tokens[:-1], tokens[:, 1:] * tokens[:, :-1]):
        assert abs(shifted.mean()) < 4 * tokens.var() / np.sqrt(shifted.size)


@pytest.mark.parametrize("params", [SamplingParams(seed=11, top_p=0.9, top_k=40), _PENALTIES])
def test_token_depends_on_the_seed_not_on_the_company(params):
    """The same request alone, and in other slots, buckets and positions among other requests."""
    logits_V = _logits(1)[0]
    tokens = []
    for num_seqs, slot, position in ((1, 0, 0), (4, 3, 1), (16, 5, 15), (40, 33, 2), (40, 2, 39)):
        sampler = Sampler(vocab_size=_V)
        if params.has_penalties:
            sampler.admit(slot, params, prompt=[1, 2, 3], output=[])
        others = [s for s in range(num_seqs) if s != slot]
        seqs = [Seq(SamplingParams(top_p=0.5), slot=s, default_seed=s) for s in others]
        seqs.insert(position, Seq(params, slot=slot))
        run = []
        for step in range(6):
            seqs[position] = seqs[position]._replace(output_index=step)
            logits_SV = _logits(num_seqs, seed=num_seqs + step)
            logits_SV[position] = np.roll(logits_V, step)
            run.append(sampler.step(logits_SV, seqs).token[position])
        tokens.append(run)
    assert all(run == tokens[0] for run in tokens)
    assert len(set(tokens[0])) > 1


def test_resumed_request_goes_on_as_if_never_stopped():
    """Writing the slot with the output so far gives the state that stepping gave, slot aside."""
    params = SamplingParams(
        **{name: getattr(_PENALTIES, name) for name in ("temperature", "presence_penalty", "seed")},
        repetition_penalty=1.2,
        bad_words_token_ids=[[5, 6], [7]],
        min_tokens=4,
    )
    prompt = [1, 2, 250]
    stepped = Sampler(vocab_size=_V)
    stepped.admit(0, params, prompt=prompt, eos=[9])
    output: list[int] = []
    for step in range(12):
        output += stepped.step(_logits(1, seed=step), [Seq(params, output_index=step)]).token
    resumed = Sampler(vocab_size=_V)
    resumed.admit(2, params, prompt=prompt, output=output, eos=[9])
    for before, after in zip(stepped.state, resumed.state, strict=True):
        np.testing.assert_array_equal(before[0], after[2])
    logits_SV = _logits(1, seed=99)
    assert (
        stepped.step(logits_SV, [Seq(params, output_index=12)]).token
        == resumed.step(logits_SV, [Seq(params, slot=2, output_index=12)]).token
    )


def test_rows_that_do_not_sample_change_no_state():
    sampler = Sampler(vocab_size=_V)
    sampler.admit(1, _PENALTIES, prompt=[1], output=[5])
    before = [np.array(leaf) for leaf in sampler.state]
    sampler.step(_logits(2), [Seq(_PENALTIES, slot=s, samples=False) for s in (1, 2)])
    for old, new in zip(before, sampler.state, strict=True):
        np.testing.assert_array_equal(old, new)


def test_counts_saturate():
    state = init_state(max_num_seqs=1, vocab_size=8)
    counts_RV = state.output_counts.at[0, 3].set(65534)
    state = state._replace(output_counts=counts_RV)
    for expected in (65535, 65535):
        state = advance(state, jnp.array([0], jnp.int32), jnp.array([3], jnp.int32))
        assert state.output_counts[0].tolist() == [0, 0, 0, expected, 0, 0, 0, 0]
    assert state.recent[0].tolist() == [-1] * 6 + [3, 3]


@pytest.mark.parametrize("params", [_GREEDY, SamplingParams(top_p=0.9, top_k=5), _PENALTIES])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_row_fails_alone(params, broken):
    logits_SV = _logits(3)
    logits_SV[1] = -np.inf
    logits_SV[1, 200:] = broken
    seqs = [Seq(params, slot=slot) for slot in range(3)]

    def run(logits_SV: np.ndarray):
        sampler = Sampler(vocab_size=_V)
        if params.has_penalties:
            for slot in range(3):
                sampler.admit(slot, params)
        return sampler.step(logits_SV, seqs)

    result = run(logits_SV)
    assert result.ok == [True, False, True]
    healthy = run(_logits(3))
    assert (result.token[0], result.token[2]) == (healthy.token[0], healthy.token[2])
    assert 0 <= result.token[1] < _V


def test_settings_that_forbid_every_token_fail_the_row():
    params = SamplingParams(allowed_token_ids=[5], bad_words_token_ids=[[5]])
    sampler = Sampler(vocab_size=_V)
    sampler.admit(0, params)
    assert sampler.step(_logits(1), [Seq(params)]).ok == [False]
