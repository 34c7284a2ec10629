"""How fast a step could be at best: bytes and operations against what the machine can move and do.

Pure arithmetic (the roofline model of Williams, Waterman and Patterson, 2009): of reading memory
and computing the longer counts, since they overlap; talking to the other devices is added, since in
a layer it waits for the result. Knows no models and imports no JAX. Rates are the data sheets':
real engines reach a part of them (docs/results/plans.md).
"""

import math
from dataclasses import dataclass

HOP_S = 5e-7
"""From one device to another: order of magnitude, for TPU links and NVLink alike."""

ASSUMPTIONS = (
    "all of the memory bandwidth and of the bfloat16 rate of the data sheet are used",
    "reading memory and computing overlap; collectives do not overlap with either",
    "each step reads all weights but the embedding table, and keys and values of all its tokens",
    f"an all-reduce takes 2 log2(n) hops of {HOP_S * 1e6:.1f} us, and 2 (n-1) / n of its bytes "
    "pass the links of a ring",
    "the host is never waited for",
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a model's step costs one device."""

    weight_bytes: int  # read in every step
    kv_bytes_per_token: int
    flops_per_token: float  # of all layers' products
    flops_per_row: float  # of the output head, for each token that is sampled
    flops_per_pair: float  # a query and a key of it, in all layers
    num_collectives: int  # a step
    collective_bytes_per_token: float  # results of all of a step's collectives


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device can do."""

    num_devices: int  # that share the model
    bytes_per_s: float
    flops_per_s: float
    ring_bytes_per_s: float  # to the next device of a ring, one direction


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step, and of its parts."""

    memory_s: float
    compute_s: float
    network_s: float

    @property
    def total_s(self) -> float:
        return max(self.memory_s, self.compute_s) + self.network_s

    @property
    def bound_by(self) -> str:
        """The largest part."""
        parts = {
            "memory": self.memory_s,
            "compute": self.compute_s,
            "network": self.network_s,
        }
        return max(parts, key=parts.__getitem__)


def decode_step(work: Work, rates: Rates, *, batch: int, context: float) -> StepTime:
    """`batch` sequences, each of `context` tokens so far, get a token each."""
    flops = batch * (work.flops_per_token + work.flops_per_row + context * work.flops_per_pair)
    return StepTime(
        memory_s=(work.weight_bytes + batch * context * work.kv_bytes_per_token)
        / rates.bytes_per_s,
        compute_s=flops / rates.flops_per_s,
        network_s=_network_s(work, rates, num_tokens=batch),
    )


def prefill_step(work: Work, rates: Rates, *, num_tokens: int, prompt: int) -> StepTime:
    """A step of `num_tokens` tokens of prompts that are `prompt` long (a token sees half of it)."""
    flops = num_tokens * (work.flops_per_token + prompt / 2 * work.flops_per_pair)
    flops += max(num_tokens / prompt, 1) * work.flops_per_row
    return StepTime(
        memory_s=work.weight_bytes / rates.bytes_per_s,
        compute_s=flops / rates.flops_per_s,
        network_s=_network_s(work, rates, num_tokens=num_tokens),
    )


def _network_s(work: Work, rates: Rates, *, num_tokens: int) -> float:
    """Least latency and least traffic of all-reduces (Thakur, Rabenseifner and Gropp, 2005)."""
    n = rates.num_devices
    if n == 1:
        return 0.0
    wire_bytes = 2 * (n - 1) / n * num_tokens * work.collective_bytes_per_token
    hops = work.num_collectives * 2 * math.ceil(math.log2(n))
    return hops * HOP_S + wire_bytes / rates.ring_bytes_per_s


def output_tokens_per_s(
    work: Work,
    rates: Rates,
    *,
    batch: int,
    input_len: int,
    output_len: int,
    step_tokens: int,
) -> float:
    """Of requests of that shape, `batch` of them at any time, prompts in steps of `step_tokens`."""
    decode_s = (
        decode_step(work, rates, batch=batch, context=input_len + output_len / 2).total_s / batch
    )
    prefill_s = prefill_step(work, rates, num_tokens=step_tokens, prompt=input_len).total_s
    request_s = output_len * decode_s + input_len / step_tokens * prefill_s
    return output_len / request_s


def cost_per_million(tokens_per_s: float, *, price_per_hour: float) -> float:
    """Price of a million tokens, in the currency of `price_per_hour`."""
    return price_per_hour / 3600 / tokens_per_s * 1e6
