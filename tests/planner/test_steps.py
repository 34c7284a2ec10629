"""A step continued from two layers against the same step compiled whole, by the CPU's compiler."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.planner.compile import ProgramFacts, divide_memory, lay_out
from jaxinfer.planner.hlo import Collective
from jaxinfer.planner.messages import ProgramRow
from jaxinfer.planner.steps import compile_rows, continued, layers_are_equal
from jaxinfer.planner.topologies import parse_topology
from tests.runner.tiny_llama import TinyLlama

ONE = ProgramFacts(
    num_args=10,
    argument_bytes=1000,
    output_bytes=500,
    alias_bytes=400,
    temp_bytes=70,
    code_bytes=30,
    moved_bytes=2000,
    flops=300.0,
    collectives=(Collective(kind="all-reduce", num_bytes=8, group_size=2, always=True),),
    trace_s=1.0,
    compile_s=2.0,
)
TWO = replace(
    ONE,
    num_args=14,
    argument_bytes=1100,
    temp_bytes=71,
    flops=310.0,
    collectives=ONE.collectives * 3,
)


def test_a_step_grows_by_what_a_layer_adds():
    """The step itself may be larger in all: only the difference of the others counts."""
    step = replace(TWO, argument_bytes=5000, temp_bytes=900, moved_bytes=7000)
    whole = continued(step, ONE, replace(TWO, moved_bytes=2100), more=2, ratio=1)
    assert (whole.argument_bytes, whole.temp_bytes, whole.moved_bytes) == (5200, 902, 7200)
    assert whole.num_args == 22
    assert whole.flops == 330.0
    assert whole.collectives == ONE.collectives * 7


def test_larger_steps_grow_in_proportion():
    mixed = replace(TWO, collectives=())
    whole = continued(mixed, ONE, TWO, more=1, ratio=4)
    assert (whole.argument_bytes, whole.temp_bytes) == (1200, 75)
    assert whole.flops == whole.moved_bytes == 0
    assert [item.num_bytes for item in whole.collectives] == [32, 32]


def test_layers_that_differ_are_not_continued():
    assert layers_are_equal({"model_type": "llama"})
    assert layers_are_equal({"model_type": "qwen3", "layer_types": ["full_attention"] * 4})
    assert not layers_are_equal({"model_type": "smollm3"})
    assert not layers_are_equal({"model_type": "qwen2", "use_sliding_window": True})
    assert not layers_are_equal({"layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.slow
def test_it_is_what_compiling_all_layers_says(tmp_path: Path):
    few, all_ = (_rows(tmp_path, all_layers=all_layers) for all_layers in (False, True))
    assert few[0].flops == pytest.approx(all_[0].flops, rel=0.02)
    assert few[0].moved_bytes == pytest.approx(all_[0].moved_bytes, rel=0.02)
    for continued_row, whole in zip(few, all_, strict=True):
        assert continued_row.num_layers_compiled == 2
        assert whole.num_layers_compiled == 8
        assert continued_row.collectives == whole.collectives
        assert continued_row.argument_bytes == whole.argument_bytes
        assert continued_row.alias_bytes == whole.alias_bytes
        assert 1.0 <= continued_row.temp_bytes / whole.temp_bytes <= 1.25  # never too few


def _rows(directory: Path, **kwargs: Any) -> list[ProgramRow]:
    TinyLlama(num_layers=8).save(directory)
    config_json = json.loads((directory / "config.json").read_text("utf-8"))
    config = engine_config_from_kwargs(
        model=str(directory),
        tensor_parallel_size=2,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        num_gpu_blocks_override=64,
        native_kernels=False,
    )
    devices: Any = jax.devices()
    engine = divide_memory(lay_out(config_json, config, parse_topology("cpux2"), devices))
    return compile_rows(config_json, engine, devices, num_workers=2, **kwargs)
