"""Answers a PlanRequest: does the model fit, how much does it hold, how fast could it be.

Arithmetic first (the engine's own memory plan, on shapes), then the compiler for the two largest
steps, whose figures replace estimates. What would fit instead is alternatives.py's question. Runs
in the planner's child process.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxinfer.config.schema import EngineConfig
from jaxinfer.kv_cache.layout import num_pages_for
from jaxinfer.logging import get_logger, log_phase
from jaxinfer.planner.alternatives import options, sweep_options
from jaxinfer.planner.check import Checked, Checker
from jaxinfer.planner.devices import MissingCompilerError
from jaxinfer.planner.messages import (
    Alternative,
    Concurrency,
    DecodeRow,
    MemoryTable,
    PlanRequest,
    PlanResult,
    PrefillRow,
)
from jaxinfer.planner.roofline import ASSUMPTIONS, Work, output_tokens_per_s
from jaxinfer.planner.topologies import Target, parse_topology
from jaxinfer.planner.work import (
    decode_rows,
    largest_batch,
    prefill_rows,
    rates_of,
    with_collectives,
    work_of,
)
from jaxinfer.runner.programs import engine_buckets
from jaxinfer.weights.reader import open_checkpoint, read_json_object

logger = get_logger(__name__)


def make_plan(request: PlanRequest) -> PlanResult:
    """Raises ConfigError and CheckpointError; that it does not fit is an answer."""
    start_s = time.monotonic()
    config_json = read_config(Path(request.config_path))
    target = parse_topology(request.topology)
    checker = Checker(config_json, num_workers=os.cpu_count() or 1)
    notes: list[str] = []
    others: list[Alternative] = []
    config = request.engine
    if request.sweep:
        config, others = _sweep(checker, request, target)
    checked = checker.arithmetic(config, target)
    if request.compile and checked.engine is not None:
        checked = _compiled(checker, checked, notes)
    if checked.engine is None and not request.sweep:
        others = _alternatives(checker, request, target, notes)
    return _result(request, checked, others, notes, wall_s=time.monotonic() - start_s)


def read_config(path: Path) -> dict[str, Any]:
    """A config.json's content, or that of a .gguf file's metadata. Raises CheckpointError."""
    if path.suffix != ".gguf":
        return read_json_object(path)
    reader = open_checkpoint(path)
    try:
        return reader.config()
    finally:
        reader.close()


def _compiled(checker: Checker, checked: Checked, notes: list[str]) -> Checked:
    """The check with the compiler's figures, or as it was where there is no compiler."""
    try:
        with log_phase(logger, f"compile for {checked.target.name}"):
            return checker.compiled(checked)
    except MissingCompilerError as error:
        notes.append(f"Not compiled: {error}")
        return checked


def _alternatives(
    checker: Checker, request: PlanRequest, target: Target, notes: list[str]
) -> list[Alternative]:
    """What would fit, one of each kind; the first is compiled too."""
    found: list[Alternative] = []
    kinds: set[str] = set()
    for option in options(request.engine, target):
        if option.kind in kinds:
            continue
        checked = checker.arithmetic_or_none(option.config, option.target)
        if checked is None or checked.engine is None:
            continue
        if request.compile and not found:
            checked = _compiled(checker, checked, notes)
            if checked.engine is None:
                continue  # the estimate of the temporaries was too small
        kinds.add(option.kind)
        found.append(_alternative(request, option.flags, checked))
    return found


def _sweep(
    checker: Checker, request: PlanRequest, target: Target
) -> tuple[EngineConfig, list[Alternative]]:
    """All ways to share the machine, the best first, and the settings of the best."""
    rows = []
    for option in sweep_options(request.engine, target):
        checked = checker.arithmetic(option.config, target)
        rows.append((_alternative(request, option.flags, checked), option.config))
    rows.sort(
        key=lambda row: (row[0].fits, row[0].output_tokens_per_s or 0.0, row[0].num_pages),
        reverse=True,
    )
    return rows[0][1], [row for row, _ in rows]


def _alternative(request: PlanRequest, flags: str, checked: Checked) -> Alternative:
    config = checked.layout.config
    replicas = checked.target.num_devices // config.parallel.tensor_parallel_size
    max_len = config.model.max_model_len
    assert max_len is not None
    tokens = 0 if checked.engine is None else checked.cache_tokens
    return Alternative(
        flags=flags,
        fits=checked.engine is not None,
        why_not=checked.why_not.splitlines()[0] if checked.why_not else "",
        compiled=bool(checked.programs),
        num_pages=0 if checked.engine is None else checked.engine.limits.num_pages,
        concurrency=tokens / max_len,
        output_tokens_per_s=_best_rate(request, checked, replicas=replicas),
        replicas=replicas,
    )


def _best_rate(request: PlanRequest, checked: Checked, *, replicas: int) -> float | None:
    """Roofline of the whole machine, with as many requests as it holds."""
    config = checked.layout.config
    rates = rates_of(checked.target, tensor=config.parallel.tensor_parallel_size)
    max_seqs, step_tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
    assert max_seqs is not None and step_tokens is not None
    if rates is None or checked.engine is None:
        return None
    length = request.input_len + request.output_len // 2
    batch = largest_batch(checked.cache_tokens, max_num_seqs=max_seqs, length=length)
    if batch == 0:
        return None
    return replicas * output_tokens_per_s(
        _work(checked),
        rates,
        batch=batch,
        input_len=request.input_len,
        output_len=request.output_len,
        step_tokens=step_tokens,
    )


def _work(checked: Checked) -> Work:
    work = work_of(checked.layout)
    if not checked.programs:
        return work
    decode = checked.programs[0]
    return with_collectives(work, decode.collectives, num_tokens=decode.num_tokens)


def _result(
    request: PlanRequest,
    checked: Checked,
    others: Sequence[Alternative],
    notes: Sequence[str],
    *,
    wall_s: float,
) -> PlanResult:
    config, target = checked.layout.config, checked.target
    scheduler, max_len = config.scheduler, config.model.max_model_len
    assert scheduler.max_num_seqs and scheduler.max_num_batched_tokens and max_len
    decode, prefill = _roofline(request, checked)
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
        code_bytes=_code_bytes(checked),
        concurrency=_concurrency(checked, max_len),
        programs=list(checked.programs),
        decode=decode,
        prefill=prefill,
        alternatives=list(others),
        assumptions=list(ASSUMPTIONS) if decode else [],
        notes=[*notes, *_remarks(checked)],
        wall_s=wall_s,
    )


def _memory(checked: Checked) -> MemoryTable | None:
    if checked.engine is None:
        return None
    plan = checked.engine.memory
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


def _code_bytes(checked: Checked) -> int | None:
    """All programs': each kind is counted as large as its largest, which was compiled. None where
    the compiler does not say."""
    engine = checked.engine
    if engine is None or not checked.programs:
        return None
    buckets = engine_buckets(engine.config, engine.model, engine.limits)
    decode, mixed = checked.programs
    num_decode = sum(bucket.decode_only for bucket in buckets)
    num_mixed = len(buckets) - num_decode
    return num_decode * decode.code_bytes + num_mixed * mixed.code_bytes or None


def _roofline(request: PlanRequest, checked: Checked) -> tuple[list[DecodeRow], list[PrefillRow]]:
    config = checked.layout.config
    tensor, scheduler = config.parallel.tensor_parallel_size, config.scheduler
    rates = rates_of(checked.target, tensor=tensor)
    max_len = config.model.max_model_len
    assert scheduler.max_num_seqs and scheduler.max_num_batched_tokens and max_len
    if rates is None or checked.engine is None:
        return [], []
    work, price = _work(checked), request.price_per_hour
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
                f"Steps were compiled with 1 and {checked.programs[0].num_layers_compiled} layers "
                "and continued by the difference: all layers are equal."
            )
        plan = checked.engine.memory
        planned = plan.weight_bytes + plan.state_bytes + plan.kv_bytes
        padding = checked.programs[0].argument_bytes - planned
        if padding > planned / 100:
            remarks.append(f"The compiler pads arrays by {padding / 2**20:.0f} MiB.")
        if measured < checked.engine.memory.temp_bytes:
            remarks.append(
                f"The largest step needs {measured / 2**20:.0f} MiB of the "
                f"{checked.engine.memory.temp_bytes / 2**20:.0f} MiB that the engine keeps for it."
            )
    if target.chip.platform == "gpu":
        remarks.append("A GPU's kernels are tried on it at the start; another may be chosen then.")
    return remarks
