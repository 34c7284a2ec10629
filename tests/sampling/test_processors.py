"""Each change of the logits against an independent reference, alone and beside other rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.core.sampling_params import MAX_LOGIT_BIAS, SamplingParams
from jaxinfer.sampling.params import pack_sampling, step_words, unpack_sampling
from jaxinfer.sampling.processors import mask_padding, process_logits
from jaxinfer.sampling.state import (
    MAX_BANNED_STOPS,
    init_state,
    needs_slot_row,
    slot_row,
    write_slot,
)

_V = 150  # not a multiple of 32
_WIDTH = 160  # of the logits, padding included
_PROMPT = [3, 4, 5, 3, 149]
_OUTPUT = [7, 4, 7, 7, 20, 21, 22, 23, 24, 25, 26]
_EOS = (2, 149)
_LOGITS_V = np.random.default_rng(0).normal(size=_V).astype(np.float32) * 5


@jax.jit
def _process(logits_SV, words_SW, state):
    return process_logits(logits_SV, unpack_sampling(words_SW), state)


def _processed(params: SamplingParams, *, output=_OUTPUT) -> np.ndarray:
    """The logits of a row with these settings, which stands beside rows that must not change."""
    plain = SamplingParams()
    state = init_state(max_num_seqs=3, vocab_size=_V)
    assert needs_slot_row(params)
    row = slot_row(
        params,
        prompt_token_ids=_PROMPT,
        output_token_ids=output,
        eos_token_ids=_EOS,
        vocab_size=_V,
    )
    state = write_slot(state, jnp.int32(1), row)
    state = write_slot(state, jnp.int32(2), row)  # stale: its request has other settings now
    table_RW = np.stack([pack_sampling(one, default_seed=0) for one in (plain, params, plain)])
    words_SW = step_words(
        table_RW,
        slots_S=np.array([2, 1, 0, 1]),
        output_indices_S=np.array([0, len(output), 0, 0]),
        samples_S=np.array([True, True, True, False]),
    )
    logits_SV = np.tile(np.pad(_LOGITS_V, (0, _WIDTH - _V)), (4, 1))
    with jax.numpy_dtype_promotion("strict"):
        result_SV = np.asarray(_process(jnp.asarray(logits_SV), jnp.asarray(words_SW), state))
    for other in (0, 2, 3):
        np.testing.assert_array_equal(result_SV[other], logits_SV[other])
    return result_SV[1, :_V]


def _banned(result_V: np.ndarray) -> list[int]:
    banned_V = np.isneginf(result_V)
    np.testing.assert_array_equal(result_V[~banned_V], _LOGITS_V[~banned_V])
    return np.flatnonzero(banned_V).tolist()


@pytest.mark.parametrize("penalty", [1.3, 0.5])
@pytest.mark.parametrize("output", [_OUTPUT, []])
def test_repetition_penalty_counts_prompt_and_output(penalty, output):
    """Keskar et al. 2019: positive logits are divided, others multiplied."""
    expected_V = _LOGITS_V.copy()
    for token in {*_PROMPT, *output}:
        expected_V[token] *= 1 / penalty if expected_V[token] > 0 else penalty
    result_V = _processed(SamplingParams(repetition_penalty=penalty), output=output)
    np.testing.assert_allclose(result_V, expected_V, rtol=1e-6)


def test_presence_and_frequency_count_the_output_only():
    result_V = _processed(SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25))
    counts_V = np.bincount(_OUTPUT, minlength=_V)
    expected_V = _LOGITS_V + 0.25 * counts_V - 0.5 * (counts_V > 0)
    np.testing.assert_allclose(result_V, expected_V, rtol=1e-6)


def test_tiny_repetition_penalty_stays_finite():
    assert np.isfinite(_processed(SamplingParams(repetition_penalty=1e-45))).all()


def test_allowed_token_ids():
    allowed = [0, 31, 32, 63, 64, 149]
    banned = _banned(_processed(SamplingParams(allowed_token_ids=allowed)))
    assert banned == sorted(set(range(_V)) - set(allowed))


def test_logit_bias():
    bias = {0: -100.0, 31: 0.5, 149: 100.0} | {n: n / 7 for n in range(40, 120)}
    expected_V = _LOGITS_V.copy()
    for token, value in bias.items():
        expected_V[token] += np.float32(value)
    np.testing.assert_allclose(_processed(SamplingParams(logit_bias=bias)), expected_V, rtol=1e-6)


@pytest.mark.parametrize("num_output", [0, 3, 10, 11, 12])
def test_min_tokens_bans_eos_and_stop_tokens_until_reached(num_output):
    output = list(range(20, 20 + num_output))
    params = SamplingParams(min_tokens=11, stop_token_ids=[9, 2, 77], ignore_eos=True)
    banned = _banned(_processed(params, output=output))
    assert banned == ([2, 9, 77, 149] if num_output < 11 else [])


@pytest.mark.parametrize(
    ("words", "banned"),
    [
        ([[5]], [5]),
        ([[26, 9]], [9]),
        ([[25, 9]], []),
        ([[24, 25, 26, 0]], [0]),
        ([[20, 21, 22, 23, 24, 25, 26, 8]], [8]),  # as long as a word may be
        ([[7, 21, 22, 23, 24, 25, 26, 8]], []),
        ([[26, 9], [1, 2], [149], [26, 149]], [9, 149]),
        ([[n % 140] for n in range(256)], list(range(140))),
    ],
)
def test_bad_words(words, banned):
    assert _banned(_processed(SamplingParams(bad_words_token_ids=words))) == banned


def test_bad_words_look_at_the_output_not_the_prompt():
    params = SamplingParams(bad_words_token_ids=[[149, 9], [3, 149, 8]])
    assert _banned(_processed(params, output=[])) == []
    assert _banned(_processed(params, output=[149])) == [9]


def test_all_together_in_order():
    """A ban stands whatever the bias; penalties see the biased logit."""
    params = SamplingParams(
        allowed_token_ids=[4, 5, 7, 9],
        bad_words_token_ids=[[26, 9]],
        logit_bias={9: 100.0, 7: 50.0, 8: 100.0},
        repetition_penalty=2.0,
        frequency_penalty=1.0,
    )
    expected_V = np.full(_V, -np.inf, np.float32)
    for token, bias, count in ((4, 0.0, 1), (5, 0.0, 0), (7, 50.0, 3)):
        logit = _LOGITS_V[token] + bias
        expected_V[token] = (logit / 2 if logit > 0 else logit * 2) - count
    np.testing.assert_allclose(_processed(params), expected_V, rtol=1e-6)


def test_limits_hold_what_requests_may_ask():
    slot_row(
        SamplingParams(
            min_tokens=1,
            stop_token_ids=list(range(64)),
            logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0),
        ),
        prompt_token_ids=[],
        output_token_ids=[],
        eos_token_ids=range(100, 100 + MAX_BANNED_STOPS - 64),
        vocab_size=1000,
    )


def test_padding_is_masked():
    masked_SV = np.asarray(mask_padding(jnp.zeros((2, _WIDTH)), vocab_size=_V))
    assert np.isneginf(masked_SV[:, _V:]).all()
    assert (masked_SV[:, :_V] == 0).all()
