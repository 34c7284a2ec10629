"""Compiles an engine's step for a machine that is not here, and checks the program.

Layers of equal shape are unrolled and cost the same, so the model is compiled with two; memory is
planned for all of them. What must move is defined by `ideal_bytes`.
"""

from collections.abc import Sequence
from functools import cache

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.parallel.mesh import Device
from jaxinfer.planner.compile import (
    CompiledStep,
    TargetEngine,
    compile_step,
    divide_memory,
    lay_out,
    page_shape,
)
from jaxinfer.planner.devices import target_devices
from jaxinfer.planner.hlo import Collective
from jaxinfer.planner.steps import with_layers
from jaxinfer.planner.topologies import parse_topology
from jaxinfer.planner.traffic import Traffic, traffic_of
from jaxinfer.runner.buckets import Bucket
from jaxinfer.runner.memory import with_measured_temp
from target_checks.cases import SETTINGS, StepCase
from target_checks.rows import MIB, Row, counted

NUM_LAYERS = 2
_MOST_MOVED = 1.1  # times the ideal
_ARGS_PER_LAYER = 9  # parameters and pages
_OTHER_ARGS = 20


@cache
def devices_of(topology: str) -> tuple[Device, ...]:
    """Asks the compiler once."""
    return target_devices(parse_topology(topology))


def check_step(case: StepCase) -> Row:
    """Compiles; the row says what is wrong with the program by itself."""
    target, devices = parse_topology(case.topology), devices_of(case.topology)
    settings = engine_config_from_kwargs(
        model=case.model, tensor_parallel_size=case.tensor, **SETTINGS
    )
    whole = divide_memory(lay_out(case.config_json, settings, target, devices))
    engine = with_layers(case.config_json, whole, devices, NUM_LAYERS)
    step = compile_step(engine, case.bucket)
    facts = step.facts
    gpu = target.chip.gpu
    traffic = traffic_of(
        step.hlo, pages=page_shape(engine), cache_bytes=0 if gpu is None else gpu.l2_bytes
    )
    always = [item for item in facts.collectives if item.always]
    others = [item for item in facts.collectives if not item.always]
    ideal = ideal_bytes(engine, case.bucket)
    return Row(
        name=case.name,
        num_args=facts.num_args,
        argument_mib=facts.argument_bytes / MIB,
        alias_mib=facts.alias_bytes / MIB,
        temp_mib=facts.temp_bytes / MIB,
        code_mib=facts.code_bytes / MIB,
        moved_mib=traffic.num_bytes / MIB,
        near_mib=traffic.near_bytes / MIB,
        ideal_mib=ideal / MIB,
        always=counted(always),
        in_branches=counted(others),
        trace_s=facts.trace_s,
        compile_s=facts.compile_s,
        largest=tuple(
            f"{item.num_bytes / MIB:.1f} MiB {item.opcode} {item.where}" for item in traffic.largest
        ),
        problems=(
            *memory_problems(whole, engine, step),
            *traffic_problems(engine, case.bucket, traffic, ideal),
            *collective_problems(engine, case.bucket, always, others),
        ),
    )


def ideal_bytes(engine: TargetEngine, bucket: Bucket) -> int:
    """What a step must move on one device, without the pages.

    Each weight once, but for rows of the embedding that no token looks up; of each product its
    inputs and outputs once, and the residual stream read and written at each addition; float32
    logits written and read. A sum over devices is an operation of its own, with input and output,
    and stands between a product and its addition, which then reads its other input, too. On a GPU
    that is always so, and norms and the product of gate and up are operations of their own. A chip
    that keeps some of these moves less.
    """
    model, num_tokens = engine.model, bucket.num_tokens
    shape, tensor = model.definition.shape, engine.config.parallel.tensor_parallel_size
    params = model.params
    item = params["final_norm.scale"].dtype.itemsize
    table = params["embedding.table"]
    (model_dim,) = params["final_norm.scale"].shape
    _, _, hidden_dim = params["layers.0.mlp.gate_up.kernel"].shape
    heads = shape.num_kv_heads // tensor
    queries = heads * shape.queries_per_kv * shape.head_dim
    projected = queries + 2 * heads * shape.head_dim
    # qkv in, out; attention in, out; out in, out; gate and up in, out; down in, out; two additions
    per_token = (
        (model_dim + projected)
        + (projected + queries)
        + (queries + model_dim)
        + (model_dim + 2 * hidden_dim // tensor)
        + (2 * hidden_dim // tensor + model_dim)
        + 2 * 2 * model_dim
    )
    is_gpu, is_split = engine.target.chip.gpu is not None, tensor > 1
    if is_gpu:
        per_token += 2 * 2 * model_dim + 2 * hidden_dim // tensor
    if is_gpu or is_split:
        per_token += 2 * model_dim
    sums = 2 * model_dim if is_split else 0
    per_token += 2 * sums
    logits = 2 * 4 * bucket.num_seqs * table.shape[0] // tensor
    layers = shape.num_layers * num_tokens * per_token * item
    embedding = num_tokens * (model_dim + sums) * item
    return weights_read(engine) + embedding + layers + logits


def weights_read(engine: TargetEngine) -> int:
    """Bytes of the weights on one device, without a table that is only looked up in."""
    params, tensor = engine.model.params, engine.config.parallel.tensor_parallel_size
    table = params["embedding.table"]
    is_looked_up = "head.kernel" in params
    return engine.model.weight_bytes - is_looked_up * table.size * table.dtype.itemsize // tensor


def memory_problems(whole: TargetEngine, engine: TargetEngine, step: CompiledStep) -> list[str]:
    """Does it fit, is the cache changed in place, are arrays laid out without padding."""
    facts, found = step.facts, []
    cache_bytes = engine.memory.kv_bytes
    if not with_measured_temp(whole.memory, facts.temp_bytes).fits:
        found.append("does not fit")
    if facts.temp_bytes > whole.memory.temp_bytes:
        found.append(f"temporaries above the plan's {whole.memory.temp_bytes / MIB:.0f} MiB")
    if facts.alias_bytes < cache_bytes:
        found.append("the cache is not changed in place")
    if facts.temp_bytes >= cache_bytes // NUM_LAYERS:
        found.append("temporaries as large as a layer's cache")
    known = engine.memory.weight_bytes + engine.memory.state_bytes + cache_bytes
    if facts.argument_bytes > 1.01 * known + MIB:
        found.append(f"arguments padded: {facts.argument_bytes / MIB:.0f}, not {known / MIB:.0f}")
    if facts.num_args > NUM_LAYERS * _ARGS_PER_LAYER + _OTHER_ARGS:
        found.append(f"{facts.num_args} arguments")
    return found


def rows_written(engine: TargetEngine, bucket: Bucket) -> int:
    """What XLA moves of the pages: on a GPU it writes the step's rows; a TPU's kernel does."""
    if engine.target.chip.gpu is None:
        return 0
    _, num_kv, _, width = page_shape(engine)
    item = engine.arrays.pages_L[0].dtype.itemsize
    return 2 * len(engine.arrays.pages_L) * bucket.num_tokens * num_kv * width * item


def traffic_problems(
    engine: TargetEngine, bucket: Bucket, traffic: Traffic, ideal: int
) -> list[str]:
    """Is no weight read twice or copied, does nothing but a kernel touch the pages."""
    found = []
    if traffic.page_bytes > rows_written(engine, bucket):
        found.append(f"{traffic.page_bytes / MIB:.0f} MiB of pages moved beside the kernel")
    if traffic.num_bytes > _MOST_MOVED * ideal:
        found.append(f"moves {traffic.num_bytes / ideal:.2f} times what it must")
    if traffic.num_bytes < weights_read(engine):
        found.append("moves less than the weights: the text was not understood")
    return found


def collective_problems(
    engine: TargetEngine,
    bucket: Bucket,
    always: Sequence[Collective],
    in_branches: Sequence[Collective],
) -> list[str]:
    """Two sums a layer and one for the embedding; none of more than activations or logits."""
    shape, tensor = engine.model.definition.shape, engine.config.parallel.tensor_parallel_size
    kinds = counted(always)
    gathers, scatters = kinds.pop("all-gather", 0), kinds.pop("reduce-scatter", 0)
    sums = kinds.pop("all-reduce", 0) + scatters
    expected = 0 if tensor == 1 else 2 * shape.num_layers + 1
    found = []
    if sums != expected or gathers != scatters or kinds:
        found.append(f"collectives {counted(always)}, not {expected} all-reduce")
    (model_dim,) = engine.model.params["final_norm.scale"].shape
    most = {
        "always": 4 * bucket.num_tokens * model_dim,
        "in branches": 4 * bucket.num_seqs * engine.model.params["embedding.table"].shape[0],
    }
    for where, items in (("always", always), ("in branches", in_branches)):
        largest = max((item.num_bytes for item in items), default=0)
        if largest > most[where]:
            found.append(f"a collective of {largest / MIB:.0f} MiB {where}")
    return found
