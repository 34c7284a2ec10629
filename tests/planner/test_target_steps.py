"""scripts/check_targets: what makes a compiled step a bad one, on a layout that is not compiled."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.planner.compile import (
    CompiledStep,
    ProgramFacts,
    TargetEngine,
    divide_memory,
    lay_out,
)
from jaxinfer.planner.hlo import Collective
from jaxinfer.planner.steps import with_layers
from jaxinfer.planner.topologies import parse_topology
from jaxinfer.planner.traffic import Traffic

MIB = 2**20
TENSOR, NUM_LAYERS, NUM_SEQS, MODEL_DIM, VOCAB = 8, 2, 64, 4096, 129024


@pytest.fixture(scope="module", autouse=True)
def steps() -> Iterator[ModuleType]:
    scripts = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, scripts)
    from target_checks import steps

    yield steps
    sys.path.remove(scripts)
    for name in [name for name in sys.modules if name.startswith("target_checks")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def engines() -> tuple[TargetEngine, TargetEngine]:
    """Llama-3.1-8B on eight devices, whole and with two layers."""
    from target_checks.cases import SETTINGS, StepCase

    case = StepCase(topology="v6e:2x4", model="Llama-3.1-8B", tensor=TENSOR, step="decode")
    settings = engine_config_from_kwargs(model="m", tensor_parallel_size=TENSOR, **SETTINGS)
    devices = jax.devices()
    whole = divide_memory(
        lay_out(case.config_json, settings, parse_topology(case.topology), devices)
    )
    return whole, with_layers(case.config_json, whole, devices, NUM_LAYERS)


@pytest.fixture(scope="module")
def decode():
    from target_checks.cases import STEPS

    return STEPS["decode"]


def good_step(engine: TargetEngine, decode) -> CompiledStep:
    known = engine.memory.weight_bytes + engine.memory.state_bytes + engine.memory.kv_bytes
    facts = ProgramFacts(
        num_args=27,
        argument_bytes=known,
        output_bytes=engine.memory.kv_bytes,
        alias_bytes=engine.memory.kv_bytes,
        temp_bytes=50 * MIB,
        code_bytes=10 * MIB,
        moved_bytes=0,
        flops=0.0,
        collectives=(),
        trace_s=0.0,
        compile_s=0.0,
    )
    return CompiledStep(decode, facts, "", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"alias_bytes": 1000}, "not changed in place"),
        ({"temp_bytes": 2**36}, "does not fit"),
        ({"argument_bytes": 2**32}, "arguments padded"),
        ({"num_args": 300}, "300 arguments"),
    ],
)
def test_memory(steps, engines, decode, change: dict, words: str) -> None:
    whole, engine = engines
    step = good_step(engine, decode)
    found = steps.memory_problems(whole, engine, step._replace(facts=replace(step.facts, **change)))
    assert (words in "; ".join(found)) if words else not found


def test_what_must_move(steps, engines, decode) -> None:
    """By hand: of a layer 1/8 of 416 MiB and two norms, 1/8 of the head, activations, logits; five
    sums over devices, there and back, and the other input of four additions."""
    layer = (4096 * (6144 + 4096 + 2 * 14336 + 14336)) * 2 // 8 + 2 * 4096 * 2
    head = 4096 * VOCAB * 2 // 8 + 4096 * 2
    token = 2 * (8 * 4096 + 2 * 6144 // 8 + 2 * 4096 // 8 + 4 * 14336 // 8)
    ideal = steps.ideal_bytes(engines[1], decode)
    by_hand = 2 * layer + head + 64 * 4096 * 2 + 2 * 64 * token + 2 * 4 * 64 * VOCAB // 8
    by_hand += (5 * 2 + 4) * 64 * 4096 * 2
    assert ideal == pytest.approx(by_hand, rel=0.001)


@pytest.mark.parametrize(
    ("times", "page_bytes", "words"),
    [
        (1.0, 0, ""),
        (1.09, 0, ""),
        (1.2, 0, "moves 1.20 times"),
        (0.2, 0, "not understood"),
        (1.0, 2**25, "32 MiB of pages"),
    ],
)
def test_traffic(steps, engines, decode, times: float, page_bytes: int, words: str) -> None:
    ideal = steps.ideal_bytes(engines[1], decode)
    traffic = Traffic(num_bytes=int(times * ideal), near_bytes=0, page_bytes=page_bytes, largest=())
    found = steps.traffic_problems(engines[1], decode, traffic, ideal)
    assert (words in "; ".join(found)) if words else not found


def test_a_gpu_writes_rows_and_runs_more_operations(steps, engines, decode) -> None:
    """By hand: 64 rows of a head in two layers, there and back; a layer has two norms and
    silu(gate) * up."""
    on_tpus = engines[1]
    on_gpus = on_tpus._replace(target=parse_topology("h100x8"))
    assert steps.rows_written(on_tpus, decode) == 0
    assert steps.rows_written(on_gpus, decode) == 2 * 2 * 64 * 2 * 128 * 2
    more = steps.ideal_bytes(on_gpus, decode) - steps.ideal_bytes(on_tpus, decode)
    assert more == 2 * 64 * (4 * 4096 + 2 * 14336 // 8) * 2
    rows = steps.rows_written(on_gpus, decode)
    ideal = steps.ideal_bytes(on_gpus, decode)
    cases = ((1.09, rows, True), (1.2, 0, False), (1.09, rows + 1, False))
    for times, page_bytes, is_good in cases:
        traffic = Traffic(
            num_bytes=int(times * ideal), near_bytes=0, page_bytes=page_bytes, largest=()
        )
        assert is_good == (not steps.traffic_problems(on_gpus, decode, traffic, ideal))


def collective(kind: str, num_bytes: int) -> Collective:
    return Collective(kind=kind, num_bytes=num_bytes, group_size=TENSOR, always=True)


SUMS = [collective("all-reduce", 2 * NUM_SEQS * MODEL_DIM)] * (2 * NUM_LAYERS + 1)
HALVES = [collective("all-gather", 1000), collective("reduce-scatter", 1000)]


@pytest.mark.parametrize(
    ("always", "in_branches", "words"),
    [
        (SUMS, [], ""),
        (SUMS[1:] + HALVES, [collective("all-gather", 4 * NUM_SEQS * VOCAB)], ""),
        (SUMS[1:], [], "not 5 all-reduce"),
        ([*SUMS, collective("all-gather", 1000)], [], "not 5 all-reduce"),
        ([*SUMS, collective("all-to-all", 1000)], [], "not 5 all-reduce"),
        ([*SUMS[1:], collective("all-reduce", 2**25)], [], "collective of 32 MiB always"),
        (SUMS, [collective("all-gather", 2**28)], "collective of 256 MiB in branches"),
    ],
)
def test_collectives(steps, engines, decode, always, in_branches, words: str) -> None:
    found = steps.collective_problems(engines[1], decode, always, in_branches)
    assert (words in "; ".join(found)) if words else not found
