"""The roofline against numbers worked out by hand."""

from dataclasses import replace

import pytest

from jaxinfer.planner.roofline import (
    HOP_S,
    Rates,
    Work,
    cost_per_million,
    decode_step,
    output_tokens_per_s,
    prefill_step,
)

WORK = Work(
    weight_bytes=1_000_000,
    kv_bytes_per_token=100,
    flops_per_token=4_000,
    flops_per_row=500,
    flops_per_pair=2,
    num_collectives=10,
    collective_bytes_per_token=80,
)
RATES = Rates(num_devices=1, bytes_per_s=1e6, flops_per_s=1e6, ring_bytes_per_s=1e5)


def test_decoding_reads_weights_and_caches():
    step = decode_step(WORK, RATES, batch=10, context=50)
    assert step.memory_s == pytest.approx((1_000_000 + 10 * 50 * 100) / 1e6)
    assert step.compute_s == pytest.approx(10 * (4_000 + 500 + 50 * 2) / 1e6)
    assert step.network_s == 0, "one device talks to nobody"
    assert step.total_s == step.memory_s
    assert step.bound_by == "memory"


def test_prompts_are_bound_by_computing():
    step = prefill_step(WORK, RATES, num_tokens=1000, prompt=100)
    assert step.compute_s == pytest.approx((1000 * (4_000 + 50 * 2) + 10 * 500) / 1e6)
    assert (step.total_s, step.bound_by) == (step.compute_s, "compute")


def test_collectives_are_added():
    rates = replace(RATES, num_devices=4)
    step = decode_step(WORK, rates, batch=10, context=50)
    hops = 10 * 2 * 2 * HOP_S
    assert step.network_s == pytest.approx(hops + 2 * 3 / 4 * 10 * 80 / 1e5)
    assert step.total_s == pytest.approx(max(step.memory_s, step.compute_s) + step.network_s)


def test_requests_pay_for_their_prompts():
    served = output_tokens_per_s(
        WORK, RATES, batch=10, input_len=100, output_len=20, step_tokens=1000
    )
    decode_s = decode_step(WORK, RATES, batch=10, context=110).total_s
    prefill_s = prefill_step(WORK, RATES, num_tokens=1000, prompt=100).total_s
    # In the time of ten requests: 20 decode steps and one step of a thousand prompt tokens.
    assert served == pytest.approx(10 * 20 / (20 * decode_s + prefill_s))


def test_costs():
    assert cost_per_million(1000.0, price_per_hour=3.6) == pytest.approx(1.0)
