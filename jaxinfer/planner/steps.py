"""Compiles the two largest steps of an engine for its machine, and sums up what XLA says of them.

Layers of equal shape cost XLA as much each, and a step of many takes minutes to compile. So of a
model of more than a few such layers the decode step is compiled with one and with two, the step
with prompts with two, and each figure is continued by what the second layer added: to the latter
in proportion to its tokens, save FLOPs and bytes, which are not (prompts attend otherwise) and are
left out. tests/planner/test_steps.py compares that with whole compilations. A TPU's compiler is
told to hurry (`_HURRY`), which costs it some temporaries: the plan errs to the safe side.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxinfer.parallel.mesh import Device
from jaxinfer.planner.compile import (
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

FEW_LAYERS = (1, 2)
_WORTH_IT = 6  # layers from which on compiling few of them is quicker
_HURRY: CompilerOptions = MappingProxyType({"exec_time_optimization_effort": -1.0})


class _Task(NamedTuple):
    bucket: Bucket
    engine: TargetEngine
    num_layers: int


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
    counts: tuple[int, ...] = (num_layers,)
    if not all_layers and num_layers >= _WORTH_IT and layers_are_equal(config_json):
        counts = FEW_LAYERS
    engines = {
        count: engine if count == num_layers else with_layers(config_json, engine, devices, count)
        for count in counts
    }
    decode, mixed = largest_steps(engine)
    most = max(counts)
    tasks = [_Task(mixed, engines[most], most)]  # the longest first
    tasks += [_Task(decode, engines[count], count) for count in sorted(counts)]
    options = _HURRY if engine.target.chip.platform == "tpu" else {}
    with ThreadPoolExecutor(num_workers, thread_name_prefix="compile") as pool:

        def compile_one(task: _Task) -> ProgramFacts:
            return compile_step(task.engine, task.bucket, options=options).facts

        of_mixed, *of_decode = pool.map(compile_one, tasks)
    if most == num_layers:
        return [_row(decode, of_decode[0], most), _row(mixed, of_mixed, most)]
    one, two = of_decode
    ratio = mixed.num_tokens / decode.num_tokens
    return [
        _row(decode, continued(two, one, two, num_layers=num_layers, ratio=1), most),
        _row(mixed, continued(of_mixed, one, two, num_layers=num_layers, ratio=ratio), most),
    ]


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
    facts: ProgramFacts, one: ProgramFacts, two: ProgramFacts, *, num_layers: int, ratio: float
) -> ProgramFacts:
    """Facts of `num_layers` layers from those of two, and what the second layer adds to a step.

    `one` and `two` are of a step that has `ratio` times fewer tokens than that of `facts`.
    """
    more, is_same_step = num_layers - 2, ratio == 1

    def grow(value: int, first: int, second: int, times: float = 1) -> int:
        return value + more * round(max(second - first, 0) * times)

    return ProgramFacts(
        num_args=grow(facts.num_args, one.num_args, two.num_args),
        argument_bytes=grow(facts.argument_bytes, one.argument_bytes, two.argument_bytes),
        output_bytes=grow(facts.output_bytes, one.output_bytes, two.output_bytes),
        alias_bytes=grow(facts.alias_bytes, one.alias_bytes, two.alias_bytes),
        temp_bytes=grow(facts.temp_bytes, one.temp_bytes, two.temp_bytes, ratio),
        code_bytes=grow(facts.code_bytes, one.code_bytes, two.code_bytes),
        bytes_accessed=facts.bytes_accessed + more * (two.bytes_accessed - one.bytes_accessed)
        if is_same_step
        else 0.0,
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
        bytes_accessed=facts.bytes_accessed,
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
