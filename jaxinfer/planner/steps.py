"""Compiles the two largest steps of an engine for its machine, and sums up what XLA says of them.

Layers of equal shape cost XLA as much each, and a step of many takes minutes to compile. So of a
model of more than a few such layers both steps are compiled with two, and continued by what the
second of two layers adds to a decode step that ends where its layers do, which compiles in a
quarter of the time: no output head, no sampler. To the step with prompts it adds that in proportion
to its tokens, save FLOPs and bytes moved, which are not (prompts attend otherwise, weights are read
once) and are left out. tests/planner/test_steps.py compares that with whole compilations. A TPU's
compiler is told to hurry (`_HURRY`), which costs it some temporaries: the plan errs to the safe
side.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxinfer.logging import get_logger
from jaxinfer.parallel.mesh import Device
from jaxinfer.planner.compile import (
    NO_OPTIONS,
    ProgramFacts,
    TargetEngine,
    compile_step,
    divide_memory,
    lay_out,
)
from jaxinfer.planner.hlo import Collective
from jaxinfer.planner.messages import CollectiveRow, ProgramRow
from jaxinfer.runner.buckets import Bucket
from jaxinfer.runner.compiler import CompilerOptions
from jaxinfer.runner.programs import engine_buckets

logger = get_logger(__name__)

_FEW_LAYERS = 2
_WORTH_IT = 6  # layers from which on compiling few of them is quicker
_HURRY: CompilerOptions = MappingProxyType({"exec_time_optimization_effort": -1.0})


class _Task(NamedTuple):
    bucket: Bucket
    engine: TargetEngine
    layers_only: bool = False


def largest_steps(engine: TargetEngine) -> tuple[Bucket, Bucket]:
    """Of decodes alone, and with prompts: those that need the most memory."""
    buckets = engine_buckets(engine.config, engine.model, engine.limits)
    return (
        max(bucket for bucket in buckets if bucket.decode_only),
        max(bucket for bucket in buckets if not bucket.decode_only),
    )


def compile_rows(
    config_json: Mapping[str, Any],
    engine: TargetEngine,
    devices: Sequence[Device],
    *,
    num_workers: int,
    all_layers: bool = False,
) -> list[ProgramRow]:
    """Both largest steps, compiled side by side."""
    num_layers = engine.model.definition.shape.num_layers
    is_worth_it = num_layers >= _WORTH_IT and layers_are_equal(config_json)
    decode, mixed = largest_steps(engine)
    if all_layers or not is_worth_it:
        tasks = [_Task(mixed, engine), _Task(decode, engine)]
        of_mixed, of_decode = _compile_all(tasks, num_workers)
        return [_row(decode, of_decode, num_layers), _row(mixed, of_mixed, num_layers)]
    one, two = (with_layers(config_json, engine, devices, count) for count in (1, _FEW_LAYERS))
    tasks = [_Task(mixed, two), _Task(decode, two)]  # the longest first
    tasks += [_Task(decode, few, layers_only=True) for few in (one, two)]
    of_mixed, of_decode, of_one, of_two = _compile_all(tasks, num_workers)
    ratio = mixed.num_tokens / decode.num_tokens
    more = num_layers - _FEW_LAYERS
    return [
        _row(decode, continued(of_decode, of_one, of_two, more=more, ratio=1), _FEW_LAYERS),
        _row(mixed, continued(of_mixed, of_one, of_two, more=more, ratio=ratio), _FEW_LAYERS),
    ]


def _compile_all(tasks: Sequence[_Task], num_workers: int) -> list[ProgramFacts]:
    def compile_one(task: _Task) -> ProgramFacts:
        is_tpu = task.engine.target.chip.platform == "tpu"
        options = _HURRY if is_tpu else NO_OPTIONS
        step = compile_step(task.engine, task.bucket, options=options, layers_only=task.layers_only)
        num_layers = task.engine.model.definition.shape.num_layers
        logger.info(
            "compiled %s, %s %d layer(s), in %.0f s",
            task.bucket,
            "nothing but" if task.layers_only else "all of it with",
            num_layers,
            step.facts.trace_s + step.facts.compile_s,
        )
        return step.facts

    with ThreadPoolExecutor(num_workers, thread_name_prefix="compile") as pool:
        return list(pool.map(compile_one, tasks))


def layers_are_equal(config_json: Mapping[str, Any]) -> bool:
    """False where layers differ in windows or rope: what one costs is not what the next does."""
    if config_json.get("model_type") == "smollm3":
        return False
    kinds = config_json.get("layer_types") or []
    return len(set(kinds)) <= 1 and not config_json.get("use_sliding_window")


def with_layers(
    config_json: Mapping[str, Any],
    engine: TargetEngine,
    devices: Sequence[Device],
    num_layers: int,
) -> TargetEngine:
    """The same engine with as many pages and fewer layers."""
    shorter = {**config_json, "num_hidden_layers": num_layers}
    if config_json.get("layer_types"):
        shorter["layer_types"] = config_json["layer_types"][:num_layers]
    config = replace(
        engine.config,
        cache=replace(engine.config.cache, num_gpu_blocks_override=engine.limits.num_pages),
    )
    return divide_memory(lay_out(shorter, config, engine.target, devices))


def continued(
    facts: ProgramFacts, one: ProgramFacts, two: ProgramFacts, *, more: int, ratio: float
) -> ProgramFacts:
    """Facts of a step with `more` layers, each of which adds what `two` is more than `one`.

    Those are of one and two layers in a step that has `ratio` times fewer tokens.
    """
    is_same_step = ratio == 1

    def grow(value: int, first: int, second: int, times: float = 1) -> int:
        return value + more * round(max(second - first, 0) * times)

    return ProgramFacts(
        num_args=grow(facts.num_args, one.num_args, two.num_args),
        argument_bytes=grow(facts.argument_bytes, one.argument_bytes, two.argument_bytes),
        output_bytes=grow(facts.output_bytes, one.output_bytes, two.output_bytes),
        alias_bytes=grow(facts.alias_bytes, one.alias_bytes, two.alias_bytes),
        temp_bytes=grow(facts.temp_bytes, one.temp_bytes, two.temp_bytes, ratio),
        code_bytes=grow(facts.code_bytes, one.code_bytes, two.code_bytes),
        moved_bytes=grow(facts.moved_bytes, one.moved_bytes, two.moved_bytes)
        if is_same_step
        else 0,
        flops=facts.flops + more * (two.flops - one.flops) if is_same_step else 0.0,
        collectives=facts.collectives + _of_a_layer(one, two, ratio) * more,
        trace_s=facts.trace_s,
        compile_s=facts.compile_s,
    )


def _of_a_layer(one: ProgramFacts, two: ProgramFacts, ratio: float) -> tuple[Collective, ...]:
    added = Counter(two.collectives) - Counter(one.collectives)
    return tuple(
        replace(item, num_bytes=round(item.num_bytes * ratio)) for item in added.elements()
    )


def _row(bucket: Bucket, facts: ProgramFacts, num_compiled: int) -> ProgramRow:
    return ProgramRow(
        name=str(bucket),
        num_tokens=bucket.num_tokens,
        num_layers_compiled=num_compiled,
        temp_bytes=facts.temp_bytes,
        code_bytes=facts.code_bytes,
        argument_bytes=facts.argument_bytes,
        alias_bytes=facts.alias_bytes,
        moved_bytes=facts.moved_bytes,
        flops=facts.flops,
        collectives=_grouped(facts.collectives),
        trace_s=facts.trace_s,
        compile_s=facts.compile_s,
    )


def _grouped(collectives: Sequence[Collective]) -> list[CollectiveRow]:
    groups: dict[tuple[str, bool], list[Collective]] = {}
    for item in collectives:
        groups.setdefault((item.kind, item.always), []).append(item)
    return [
        CollectiveRow(
            kind=kind,
            count=len(items),
            num_bytes=sum(item.num_bytes for item in items),
            always=always,
        )
        for (kind, always), items in sorted(groups.items())
    ]
