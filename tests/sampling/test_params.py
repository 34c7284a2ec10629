"""Settings survive the packing; idle rows and seeds behave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32 as threefry_2x32_of_jax

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.sampling.params import (
    NO_TOP_K,
    NUM_WORDS,
    SamplingBatch,
    pack_sampling,
    random_bits,
    step_words,
    threefry_2x32,
    unpack_sampling,
)

_FLAGS = (
    "is_random",
    "use_penalties",
    "use_bias",
    "use_allowed",
    "use_bad_words",
    "wants_logprobs",
    "ban_stop",
)


def _unpack(params: list[SamplingParams], **step) -> SamplingBatch:
    table_RW = np.stack([pack_sampling(one, default_seed=0) for one in params])
    num = len(params)
    defaults = {
        "slots_S": np.arange(num),
        "output_indices_S": np.zeros(num, np.int32),
        "samples_S": np.ones(num, bool),
    }
    with jax.numpy_dtype_promotion("strict"):
        return unpack_sampling(jnp.asarray(step_words(table_RW, **(defaults | step))))


def test_every_setting_comes_back():
    params = SamplingParams(
        temperature=0.3,
        top_p=0.9,
        top_k=17,
        min_p=0.05,
        presence_penalty=-0.5,
        frequency_penalty=1.5,
        repetition_penalty=1.1,
        min_tokens=5,
        seed=0x1234_5678_9ABC_DEF0,
        logprobs=0,
        logit_bias={1: 1.0},
        allowed_token_ids=[1],
        bad_words_token_ids=[[1]],
    )
    batch = _unpack([SamplingParams(), params], output_indices_S=np.array([0, 4]))
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
        assert getattr(batch, name)[1] == np.float32(getattr(params, name)), name
    assert batch.repetition_penalty.tolist() == pytest.approx([1.0, 1.1])
    assert batch.top_k.tolist() == [NO_TOP_K, 17]
    assert [int(word[1]) for word in batch.seed] == [0x1234_5678, 0x9ABC_DEF0]
    assert batch.slot.tolist() == [0, 1]
    assert batch.output_index.tolist() == [0, 4]
    for flag in ("use_penalties", "use_bias", "use_allowed", "use_bad_words", "wants_logprobs"):
        assert getattr(batch, flag).tolist() == [False, True], flag
    assert batch.ban_stop.tolist() == [False, True]
    assert batch.is_random.tolist() == [True, True]


@pytest.mark.parametrize(
    ("field", "flag"),
    [
        ({"temperature": 0.0}, "is_random"),
        ({"presence_penalty": 0.1}, "use_penalties"),
        ({"logit_bias": {3: 1.0}}, "use_bias"),
        ({"allowed_token_ids": [3]}, "use_allowed"),
        ({"bad_words_token_ids": [[3]]}, "use_bad_words"),
        ({"logprobs": 0}, "wants_logprobs"),
        ({"min_tokens": 1}, "ban_stop"),
    ],
)
def test_each_field_sets_its_own_flag(field, flag):
    plain, special = _unpack([SamplingParams()]), _unpack([SamplingParams(**field)])
    changed = [name for name in _FLAGS if getattr(plain, name)[0] != getattr(special, name)[0]]
    assert changed == [flag]


def test_rows_that_do_not_sample_are_idle():
    """Whatever the settings of the slot they name, they have no flag and are outside the state."""
    params = SamplingParams(min_tokens=9, presence_penalty=1.0, logprobs=3, logit_bias={1: 1.0})
    batch = _unpack([params] * 2, slots_S=np.array([1, -1]), samples_S=np.array([False, False]))
    assert batch.slot.tolist() == [2, 2]
    for name in (*_FLAGS, "uses_top_k", "uses_top_p", "changes_some", "changes_all"):
        assert not getattr(batch, name).any(), name


def test_the_table_is_not_changed_by_a_step():
    table_RW = np.stack([pack_sampling(SamplingParams(), default_seed=0)] * 2)
    before = table_RW.copy()
    words_SW = step_words(
        table_RW,
        slots_S=np.array([1]),
        output_indices_S=np.array([7]),
        samples_S=np.array([True]),
    )
    assert words_SW.shape == (1, NUM_WORDS)
    assert words_SW.dtype == np.int32
    np.testing.assert_array_equal(table_RW, before)


def test_random_bits_differ_by_seed_and_index_only():
    seeds = [0, 1, -1, 2**32, 2**63 - 1, -(2**63)]
    params = [SamplingParams(seed=seed) for seed in seeds]
    rows = [random_bits(_unpack(params, output_indices_S=np.full(6, i))) for i in range(4)]
    values = np.stack(rows)
    assert len(np.unique(values)) == values.size
    again = random_bits(_unpack(params[2:3], output_indices_S=np.array([3])))
    assert again.tolist() == [values[3, 2]]


def test_threefry_is_the_published_one():
    key, counter = (jnp.uint32(7), jnp.uint32(2**32 - 5)), (jnp.uint32(1 << 31), jnp.uint32(9))
    expected = threefry_2x32_of_jax(key, jnp.stack(counter))
    assert [int(word) for word in threefry_2x32(key, counter)] == expected.tolist()


def test_a_request_without_seed_gets_the_given_one():
    own = pack_sampling(SamplingParams(seed=5), default_seed=9)
    given = pack_sampling(SamplingParams(), default_seed=5)
    np.testing.assert_array_equal(own, given)
