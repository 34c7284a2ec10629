"""Buckets: few, and one for every step that a scheduler may make."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.core.limits import EngineLimits
from jaxinfer.errors import ConfigError
from jaxinfer.runner.buckets import Bucket, BucketRule, choose_bucket, make_buckets

CPU = BucketRule(smallest_decode=1, smallest_mixed=32, decode_factor=8, token_factor=4)
TPU = BucketRule(smallest_decode=1, smallest_mixed=16, decode_factor=2, token_factor=4)


def limits(max_num_seqs: int, max_num_batched_tokens: int) -> EngineLimits:
    return EngineLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=4096,
        page_size=16,
        num_pages=256,
    )


def test_the_usual_cpu_buckets():
    buckets = make_buckets(limits(64, 512), CPU)
    assert [str(bucket) for bucket in buckets] == [
        "decode 1x1",
        "decode 8x8",
        "decode 64x64",
        "mixed 32x32",
        "mixed 128x64",
        "mixed 512x64",
    ]


def test_the_smallest_decode_bucket_follows_the_rule_and_the_limits():
    rule = BucketRule(smallest_decode=4, smallest_mixed=16, decode_factor=4, token_factor=4)
    assert [b.num_seqs for b in make_buckets(limits(16, 16), rule) if b.decode_only] == [4, 16]
    assert [b.num_seqs for b in make_buckets(limits(2, 16), rule) if b.decode_only] == [2]


def test_token_buckets_replace_the_mixed_ones():
    buckets = make_buckets(limits(8, 100), CPU, token_buckets=[32, 64])
    assert [b.num_tokens for b in buckets if not b.decode_only] == [32, 64, 100]
    assert [b.num_tokens for b in buckets if b.decode_only] == [1, 8]
    with pytest.raises(ConfigError, match=r"--token-buckets holds 128.*max-num-batched-tokens=100"):
        make_buckets(limits(8, 100), CPU, token_buckets=[128])


def test_the_smallest_bucket_that_holds_the_step_is_chosen():
    buckets = make_buckets(limits(64, 512), CPU)

    def choose(num_tokens: int, num_seqs: int, *, decode_only: bool = False) -> Bucket:
        return choose_bucket(
            buckets, num_tokens=num_tokens, num_seqs=num_seqs, decode_only=decode_only
        )

    assert choose(1, 1, decode_only=True).num_tokens == 1
    assert choose(5, 5, decode_only=True).num_tokens == 8
    assert choose(5, 5).num_tokens == 32  # one token each, but a prompt wants its logprobs
    assert choose(33, 1).num_tokens == 128
    assert choose(512, 64).num_tokens == 512
    with pytest.raises(AssertionError, match="no bucket holds 513 tokens"):
        choose(513, 1)


def test_both_numbers_must_fit():
    buckets = [
        Bucket(num_tokens=16, num_seqs=2, decode_only=False),
        Bucket(num_tokens=16, num_seqs=16, decode_only=False),
    ]
    chosen = choose_bucket(buckets, num_tokens=10, num_seqs=3, decode_only=False)
    assert chosen.num_seqs == 16


@st.composite
def cases(draw: st.DrawFn) -> tuple[EngineLimits, BucketRule, list[int], int, int]:
    max_tokens = draw(st.integers(1, 3000))
    max_seqs = draw(st.integers(1, min(max_tokens, 300)))
    rule = BucketRule(
        smallest_decode=draw(st.sampled_from([1, 4, 8])),
        smallest_mixed=draw(st.sampled_from([16, 32])),
        decode_factor=draw(st.sampled_from([2, 4, 8])),
        token_factor=draw(st.sampled_from([2, 4])),
    )
    token_buckets = sorted(draw(st.sets(st.integers(1, max_tokens), max_size=3)))
    num_seqs = draw(st.integers(1, max_seqs))
    num_tokens = draw(st.integers(num_seqs, max_tokens))
    return limits(max_seqs, max_tokens), rule, token_buckets, num_seqs, num_tokens


@given(case=cases())
def test_every_legal_step_has_a_bucket(
    case: tuple[EngineLimits, BucketRule, list[int], int, int],
):
    """Budgets, slots, rules and token buckets of any size; and the choice wastes little."""
    engine_limits, rule, token_buckets, num_seqs, num_tokens = case
    buckets = make_buckets(engine_limits, rule, token_buckets=token_buckets)
    assert len(set(buckets)) == len(buckets)
    mixed = choose_bucket(buckets, num_tokens=num_tokens, num_seqs=num_seqs, decode_only=False)
    assert (mixed.num_tokens, mixed.num_seqs) >= (num_tokens, 0)
    assert mixed.num_seqs >= num_seqs
    decode = choose_bucket(buckets, num_tokens=num_seqs, num_seqs=num_seqs, decode_only=True)
    assert decode.num_tokens == decode.num_seqs >= num_seqs
    assert decode.num_seqs <= max(num_seqs * rule.decode_factor, rule.smallest_decode)
    for bucket in buckets:
        # The op reads the first num_seqs tokens as decodes, whatever is there.
        assert bucket.num_seqs <= bucket.num_tokens <= engine_limits.max_num_batched_tokens
        assert bucket.num_seqs <= engine_limits.max_num_seqs
