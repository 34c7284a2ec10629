"""Answers a PlanRequest: does the model fit, how much does it hold, how fast could it be.

Arithmetic first (the engine's own memory plan, on shapes), then the compiler for the two largest
steps, whose figures replace estimates. What would fit instead is search.py's question. Runs
in the planner's child process.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from jaxinfer.kv_cache.layout import num_pages_for
from jaxinfer.planner.check import Checked, Checker
from jaxinfer.planner.messages import (
    Alternative,
    Concurrency,
    DecodeRow,
    MemoryTable,
    PlanRequest,
    PlanResult,
    PrefillRow,
)
from jaxinfer.planner.roofline import ASSUMPTIONS
from jaxinfer.planner.search import Search
from jaxinfer.planner.topologies import parse_topology
from jaxinfer.planner.work import decode_rows, prefill_rows, rates_of, work_of
from jaxinfer.weights.reader import open_checkpoint, read_json_object


def make_plan(request: PlanRequest) -> PlanResult:
    """Raises ConfigError and CheckpointError; that it does not fit is an answer."""
    start_s = time.monotonic()
    num_workers = request.engine.compile.num_compile_workers or os.cpu_count() or 1
    checker = Checker(read_config(Path(request.config_path)), num_workers=num_workers)
    search = Search(request=request, target=parse_topology(request.topology), checker=checker)
    layouts: list[Alternative] = []
    if request.sweep:
        checked, layouts = search.sweep()
    else:
        checked = search.check(request.engine)
    others = [] if checked.engine is not None else search.what_would_fit(checked)
    answer = _result(request, checked, search.notes)
    return msgspec.structs.replace(
        answer, layouts=layouts, alternatives=others, wall_s=time.monotonic() - start_s
    )


def read_config(path: Path) -> dict[str, Any]:
    """A config.json's content, or that of a .gguf file's metadata. Raises CheckpointError."""
    if path.suffix != ".gguf":
        return read_json_object(path)
    reader = open_checkpoint(path)
    try:
        return reader.config()
    finally:
        reader.close()


def _result(request: PlanRequest, checked: Checked, notes: Sequence[str]) -> PlanResult:
    """All but what the search for others found."""
    config, target = checked.layout.config, checked.target
    scheduler, max_len = config.scheduler, config.model.max_model_len
    assert scheduler.max_num_seqs and scheduler.max_num_batched_tokens and max_len
    decode, prefill = _roofline(request, checked)
    has_programs = bool(checked.programs)
    return PlanResult(
        model=request.engine.model.model,
        topology=target.name,
        num_devices=target.num_devices,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        dtype=config.model.dtype,
        kv_cache_dtype=config.cache.kv_cache_dtype,
        max_model_len=max_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        kernels=list(checked.layout.model.kernels.reasons),
        fits=checked.engine is not None,
        why_not=checked.why_not,
        memory=_memory(checked),
        code_bytes=checked.code_bytes or None,
        padding_bytes=checked.padding_bytes if has_programs else None,
        needed_bytes=checked.needed_bytes if has_programs else None,
        concurrency=_concurrency(checked, max_len),
        programs=list(checked.programs),
        decode=decode,
        prefill=prefill,
        layouts=[],
        alternatives=[],
        assumptions=list(ASSUMPTIONS) if decode else [],
        notes=[*notes, *_remarks(checked), *_remarks_on_requests(request, max_len)],
        wall_s=0.0,
    )


def _memory(checked: Checked) -> MemoryTable:
    plan = checked.memory
    return MemoryTable(
        device_bytes=plan.device_bytes,
        usable_bytes=plan.usable_bytes,
        weight_bytes=plan.weight_bytes,
        state_bytes=plan.state_bytes,
        step_bytes=plan.temp_bytes,
        page_bytes=plan.page_bytes,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        kv_reason=plan.kv_reason,
    )


def _concurrency(checked: Checked, max_len: int) -> list[Concurrency]:
    if checked.engine is None:
        return []
    limits = checked.engine.limits
    lengths = sorted({*(length for length in (1024, 8192) if length < max_len), max_len})
    return [
        Concurrency(
            num_tokens=length,
            num_seqs=limits.num_pages / num_pages_for(length, limits.page_size),
        )
        for length in lengths
    ]


def _roofline(request: PlanRequest, checked: Checked) -> tuple[list[DecodeRow], list[PrefillRow]]:
    config = checked.layout.config
    tensor, scheduler = config.parallel.tensor_parallel_size, config.scheduler
    rates = rates_of(checked.target, tensor=tensor)
    max_len = config.model.max_model_len
    assert scheduler.max_num_seqs and scheduler.max_num_batched_tokens and max_len
    if rates is None or checked.engine is None:
        return [], []
    work, price = work_of(checked.layout, checked.programs), request.price_per_hour
    if price is not None:
        price /= checked.target.num_devices // tensor  # of the part that shares a model
    decode = decode_rows(
        work,
        rates,
        cache_tokens=checked.cache_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        step_tokens=scheduler.max_num_batched_tokens,
        requests=(request.input_len, request.output_len),
        price_per_hour=price,
    )
    prefill = prefill_rows(
        work,
        rates,
        step_tokens=scheduler.max_num_batched_tokens,
        max_len=max_len,
        price_per_hour=price,
    )
    return decode, prefill


def _remarks(checked: Checked) -> list[str]:
    """What a reader of the figures should know."""
    target, config = checked.target, checked.layout.config
    tensor = config.parallel.tensor_parallel_size
    remarks = [f"{target.chip.name}: {target.chip.usable_reason}."]
    if tensor < target.num_devices:
        remarks.append(
            f"--tensor-parallel-size {tensor} uses {tensor} of {target.num_devices} devices: start "
            f"{target.num_devices // tensor} servers for all of them."
        )
    if checked.programs and checked.engine is not None:
        measured = max(row.temp_bytes for row in checked.programs)
        if (
            checked.programs[0].num_layers_compiled
            < checked.layout.model.definition.shape.num_layers
        ):
            remarks.append(
                f"Steps were compiled with {checked.programs[0].num_layers_compiled} layers and "
                "continued by what one adds: all layers are equal."
            )
        if measured < checked.engine.memory.temp_bytes:
            remarks.append(
                f"The largest step needs {measured / 2**20:.0f} MiB of the "
                f"{checked.engine.memory.temp_bytes / 2**20:.0f} MiB that the engine keeps for it."
            )
    if target.chip.platform == "gpu":
        remarks.append("A GPU's kernels are tried on it at the start; another may be chosen then.")
    return remarks


def _remarks_on_requests(request: PlanRequest, max_len: int) -> list[str]:
    length = request.input_len + request.output_len
    if length <= max_len:
        return []
    return [
        f"Speeds are of requests of {request.input_len} + {request.output_len} tokens, which is "
        f"more than --max-model-len {max_len} allows: give --input-len and --output-len."
    ]
