"""What a laid-out model's step costs a device: from shapes to the numbers of roofline.py.

Knows where parameters stand in a model's tree; compiles nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from jaxinfer.planner.compile import Layout
from jaxinfer.planner.messages import DecodeRow, PrefillRow, ProgramRow
from jaxinfer.planner.roofline import (
    Rates,
    Work,
    cost_per_million,
    decode_step,
    output_tokens_per_s,
    prefill_step,
)
from jaxinfer.planner.topologies import Target

_BATCHES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
_PROMPTS = (1024, 8192)


def rates_of(target: Target, *, tensor: int) -> Rates | None:
    """None where the machine's rates are not known: a CPU's."""
    rates = target.chip.rates
    if rates is None:
        return None
    return Rates(
        num_devices=tensor,
        bytes_per_s=rates.bytes_per_s,
        flops_per_s=rates.flops_bf16_per_s,
        ring_bytes_per_s=rates.ring_bytes_per_s,
    )


def work_of(layout: Layout, programs: Sequence[ProgramRow] = ()) -> Work:
    """With the collectives of the first program, a decode step, as the compiler made them.

    Without programs with those that a layer's layout asks for: two sums, and the embedding's.
    """
    work = _work_of_shapes(layout)
    if not programs:
        return work
    always = [row for row in programs[0].collectives if row.always]
    return replace(
        work,
        num_collectives=sum(row.count for row in always),
        collective_bytes_per_token=sum(row.num_bytes for row in always) / programs[0].num_tokens,
    )


def _work_of_shapes(layout: Layout) -> Work:
    model, tensor = layout.model, layout.config.parallel.tensor_parallel_size
    shape = model.definition.shape
    num_layer, num_head, num_embedding = 0, 0, 0  # elements of matrices, of one device
    embedding_bytes, width = 0, 1
    for path, param in model.params.items():
        assert param.sharding is not None
        own = math.prod(param.sharding.shard_shape(param.shape))
        if path.startswith("embedding"):
            num_embedding += own
            embedding_bytes += own * param.dtype.itemsize
            width = param.shape[-1]
        elif path.startswith("head"):
            num_head += own
        elif len(param.shape) > 1:
            num_layer += own
    is_tied = num_head == 0
    itemsize = 4 if layout.config.model.dtype == "float32" else 2
    num_sums = 2 * shape.num_layers + 1 if tensor > 1 else 0
    return Work(
        weight_bytes=model.weight_bytes - (0 if is_tied else embedding_bytes),
        kv_bytes_per_token=layout.needs.layout.bytes_per_token,
        flops_per_token=2.0 * num_layer,
        flops_per_row=2.0 * (num_embedding if is_tied else num_head),
        flops_per_pair=4.0
        * (shape.num_kv_heads // tensor * shape.queries_per_kv)
        * shape.head_dim
        * shape.num_layers,
        num_collectives=num_sums,
        collective_bytes_per_token=float(num_sums * width * itemsize),
    )


def largest_batch(num_tokens: int, *, max_num_seqs: int, length: int) -> int:
    """Sequences of a length that the pages and the slots hold."""
    return min(max_num_seqs, num_tokens // length)


def decode_rows(
    work: Work,
    rates: Rates,
    *,
    cache_tokens: int,
    max_num_seqs: int,
    step_tokens: int,
    requests: tuple[int, int],
    price_per_hour: float | None,
) -> list[DecodeRow]:
    """`requests` are their input and output length; `cache_tokens` what the pages hold."""
    input_len, output_len = requests
    context = input_len + output_len // 2
    rows = []
    for batch in sorted({*(b for b in _BATCHES if b < max_num_seqs), max_num_seqs}):
        step = decode_step(work, rates, batch=batch, context=context)
        served = output_tokens_per_s(
            work,
            rates,
            batch=batch,
            input_len=input_len,
            output_len=output_len,
            step_tokens=step_tokens,
        )
        rows.append(
            DecodeRow(
                batch=batch,
                context=context,
                fits=batch * context <= cache_tokens,
                step_s=step.total_s,
                bound_by=step.bound_by,
                tokens_per_s=batch / step.total_s,
                output_tokens_per_s=served,
                price_per_million=_price(served, price_per_hour),
            )
        )
    return rows


def prefill_rows(
    work: Work, rates: Rates, *, step_tokens: int, max_len: int, price_per_hour: float | None
) -> list[PrefillRow]:
    """Steps full of prompts of usual lengths."""
    rows = []
    for prompt in sorted({min(length, max_len) for length in _PROMPTS}):
        step = prefill_step(work, rates, num_tokens=step_tokens, prompt=prompt)
        per_s = step_tokens / step.total_s
        rows.append(
            PrefillRow(
                num_tokens=step_tokens,
                prompt=prompt,
                step_s=step.total_s,
                bound_by=step.bound_by,
                tokens_per_s=per_s,
                price_per_million=_price(per_s, price_per_hour),
            )
        )
    return rows


def _price(per_s: float, price_per_hour: float | None) -> float | None:
    if price_per_hour is None:
        return None
    return cost_per_million(per_s, price_per_hour=price_per_hour)
