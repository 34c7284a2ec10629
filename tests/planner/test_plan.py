"""Plans by arithmetic, in this process: real models' layers, fewer of them, worked out by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.planner import devices
from jaxinfer.planner.check import Checker
from jaxinfer.planner.compile import divide_memory
from jaxinfer.planner.messages import PlanRequest, PlanResult
from jaxinfer.planner.plan import make_plan
from jaxinfer.planner.topologies import parse_topology
from jaxinfer.planner.work import work_of
from jaxinfer.runner.build import store_facts
from jaxinfer.runner.memory import GPU_MEMORY_FRACTION
from jaxinfer.runner.sizing import attention_shape
from pallas_kernels.checked import choose_checked_kernels
from pallas_kernels.paged_attention.check import CheckReport
from pallas_kernels.paged_attention.gpu_choice import GpuRequest, GpuSpec

CONFIGS = Path(__file__).parent / "configs"
GIB = 2**30
LAYERS = 4
LLAMA = "llama-3.1-8b-instruct"
LLAMA_LAYER = 4096 * 128 * 48 + 4096 * 4096 + 3 * 4096 * 14336  # and two norms
LLAMA_TABLE = 128256 * 4096  # embedding, and head
LANES = 128  # a device's part of the vocabulary is padded to whole ones

Plan = Callable[..., PlanResult]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """`plan(model, topology, **settings)` of the first layers of a model."""

    def ask(
        model: str, topology: str, *, compile: bool = False, sweep: bool = False, **settings: Any
    ) -> PlanResult:
        path = tmp_path / f"{model}.json"
        path.write_text(json.dumps(shortened(model)))
        return make_plan(
            PlanRequest(
                config_path=str(path),
                engine=engine_config_from_kwargs(model=str(path), **settings),
                topology=topology,
                sweep=sweep,
                compile=compile,
                price_per_hour=10.0,
                input_len=1024,
                output_len=1024,
            )
        )

    return ask


def shortened(model: str) -> dict[str, Any]:
    config = json.loads((CONFIGS / f"{model}.json").read_text("utf-8"))
    return {**config, "num_hidden_layers": LAYERS}


@pytest.mark.parametrize(
    ("model", "num_heads", "width", "hidden", "tables", "extra"),
    [
        (LLAMA, 32, 4096, 14336, 2 * 128256, 0),
        ("llama-3.3-70b-instruct", 64, 8192, 28672, 2 * 128256, 0),
        ("qwen3-32b", 64, 5120, 25600, 2 * 151936, 2 * 128),  # norms of queries and keys
        ("granite-3.3-8b-instruct", 32, 4096, 12800, 385 * LANES, 0),  # one table for both
    ],
)
def test_weights_are_those_of_the_model(
    plan: Plan, model: str, num_heads: int, width: int, hidden: int, tables: int, extra: int
):
    result = plan(model, "b200", max_model_len=4096)
    layer = width * 128 * (2 * num_heads + 16) + 3 * width * hidden + 2 * width + extra
    assert result.memory.weight_bytes == 2 * (tables * width + LAYERS * layer + width)


def test_a_cache_has_what_is_left(plan: Plan):
    result = plan(LLAMA, "h200", max_model_len=131072, max_num_seqs=128)
    memory = result.memory
    assert result.fits
    assert memory.page_bytes == memory.page_size * LAYERS * 8 * 2 * 128 * 2
    assert memory.usable_bytes == int(int(150_754_820_096 * GPU_MEMORY_FRACTION) * 0.92)
    assert 0 <= memory.usable_bytes - memory.total_bytes < memory.page_bytes
    tokens = memory.num_pages * memory.page_size
    assert [row.num_tokens for row in result.concurrency] == [1024, 8192, 131072]
    assert result.concurrency[0].num_seqs == tokens / 1024


def test_decoding_alone_reads_all_but_the_embedding(plan: Plan):
    first = plan(LLAMA, "h100", max_model_len=8192).decode[0]
    read_bytes = 2 * (LAYERS * (LLAMA_LAYER + 2 * 4096) + LLAMA_TABLE + 4096)
    assert first.batch == 1
    assert first.step_s == pytest.approx((read_bytes + 1536 * LAYERS * 4096) / 3.35e12)
    assert first.bound_by == "memory"
    assert first.price_per_million == pytest.approx(10.0 / 3600 / first.output_tokens_per_s * 1e6)


def test_heads_are_shared_and_layers_sum_twice():
    engine = engine_config_from_kwargs(model="x", tensor_parallel_size=4, max_model_len=4096)
    checker = Checker(shortened(LLAMA), num_workers=1)
    checked = checker.arithmetic(engine, parse_topology("v6e:2x2"))
    work = work_of(checked.layout)
    assert work.num_collectives == 2 * LAYERS + 1
    assert work.collective_bytes_per_token == (2 * LAYERS + 1) * 4096 * 2
    assert work.kv_bytes_per_token == LAYERS * 2 * 2 * 128 * 2
    assert work.flops_per_token == 2 * LAYERS * LLAMA_LAYER / 4
    rows = -(-128256 // (4 * LANES)) * LANES
    assert work.flops_per_row == 2 * rows * 4096


def test_what_does_not_fit_says_what_would(plan: Plan):
    """Each proposal is a plan that fits when it is asked for, with the pages that were promised."""
    result = plan(LLAMA, "h100x2", gpu_memory_utilization=0.125)
    assert not result.fits
    assert "one sequence of --max-model-len 131072" in result.why_not
    changed = {item.flags.split()[0] for item in result.alternatives}
    assert {"--tensor-parallel-size", "--max-model-len", "--topology"} <= changed
    for item in result.alternatives:
        words = item.flags.split()
        settings = {
            name.removeprefix("--").replace("-", "_"): value
            for name, value in zip(words[::2], words[1::2], strict=True)
        }
        topology = settings.pop("topology", "h100x2")
        again = plan(LLAMA, topology, gpu_memory_utilization=0.125, **settings)
        assert again.fits, item
        assert again.memory.num_pages == item.num_pages


def test_two_changes_where_one_is_not_enough(plan: Plan):
    """All devices of the machine, and a shorter context or 8-bit pages."""
    whole = json.loads((CONFIGS / f"{LLAMA}.json").read_text("utf-8"))["max_position_embeddings"]
    result = plan(
        LLAMA,
        "h100x8",
        gpu_memory_utilization=0.013,
        max_num_batched_tokens=256,
        max_num_seqs=8,
    )
    assert not result.fits
    assert result.alternatives
    for item in result.alternatives:
        assert item.fits
        words = item.flags.split()
        assert words[:2] == ["--tensor-parallel-size", "8"]
        assert "--max-model-len" in words or "--kv-cache-dtype" in words
        if "--max-model-len" in words:
            assert int(words[words.index("--max-model-len") + 1]) < whole


def test_requests_longer_than_the_context_are_noted(plan: Plan):
    assert not any("--input-len" in note for note in plan(LLAMA, "h100").notes)
    (note,) = [n for n in plan(LLAMA, "h100", max_model_len=1024).notes if "--input-len" in n]
    assert "1024 + 1024 tokens, which is more than --max-model-len 1024 allows" in note


def test_a_sweep_ranks_the_layouts(plan: Plan):
    result = plan("granite-3.3-8b-instruct", "v6e:2x4", sweep=True, max_model_len=8192)
    assert result.alternatives == []
    assert {item.replicas for item in result.layouts} == {1, 2, 4, 8}
    rates = [item.output_tokens_per_s for item in result.layouts if item.fits]
    assert rates == sorted(rates, reverse=True)  # type: ignore[type-var]
    best = result.layouts[0]
    assert best.flags == f"--tensor-parallel-size {result.tensor_parallel_size}"


@pytest.mark.parametrize(("topology", "extra"), [("v6e:2x2", "plan-tpu"), ("h100x4", "gpu")])
def test_without_a_compiler_there_is_arithmetic(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, topology: str, extra: str
):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    result = plan(LLAMA, topology, compile=True, tensor_parallel_size=4, max_model_len=8192)
    assert result.fits
    assert result.decode
    assert result.programs == []
    assert f"pip install 'jaxinfer[{extra}]'" in result.notes[0]


@pytest.mark.skipif(find_spec("jax_plugins") is not None, reason="it may be there")
def test_a_missing_cuda_plugin_is_found_missing(plan: Plan):
    """As Python says it: without the package around the plugin, find_spec raises."""
    result = plan(LLAMA, "h100", compile=True, max_model_len=8192)
    assert result.fits
    assert "pip install 'jaxinfer[gpu]'" in result.notes[0]


@pytest.mark.parametrize(
    ("topology", "backend", "why_not"),
    [
        ("a100-80g", "mosaic_gpu", "needs compute capability 9.0, this is 8.0"),
        ("v6e:1x1", "pallas_tpu", "head size 80 is no multiple of 64"),
        ("h100", "pallas_tpu", "is not for 'gpu'"),
    ],
)
def test_a_backend_that_a_start_refuses_is_refused(topology: str, backend: str, why_not: str):
    config = engine_config_from_kwargs(model="x", attention_backend=backend)
    checker = Checker({**shortened(LLAMA), "head_dim": 80}, num_workers=1)
    with pytest.raises(ConfigError, match=f"attention_backend='{backend}'.*{why_not}"):
        checker.arithmetic(config, parse_topology(topology))


def test_a_checked_kernels_programs_have_the_names_of_those_built_ahead():
    """What a check measured on the GPU is not known where programs are built for it."""
    config_json, target = shortened(LLAMA), parse_topology("h100")
    layout = (
        Checker(config_json, num_workers=1)
        .arithmetic(engine_config_from_kwargs(model="x"), target)
        .layout
    )
    assert target.chip.gpu is not None
    gpu = GpuSpec(
        compute_capability=target.chip.gpu.compute_capability, num_cores=target.chip.gpu.num_cores
    )
    shape = attention_shape(layout.config, layout.model.definition)
    checked = choose_checked_kernels(
        GpuRequest(device=gpu, shape=shape), check=lambda _: CheckReport(1.2e-3, None, 0.5)
    )
    assert "0.0012" in checked.verdicts[0]
    assert store_facts(layout.config, checked, config_json) == store_facts(
        layout.config, layout.model.kernels, config_json
    )


@pytest.mark.parametrize("tensor", [3, 16])
def test_tp_must_divide_the_machine(plan: Plan, tensor: int):
    with pytest.raises(
        ConfigError, match=f"tensor_parallel_size={tensor} .* 8 devices .* one of 1, 2, 4, 8"
    ):
        plan(LLAMA, "v6e:2x4", tensor_parallel_size=tensor)


def test_other_architectures_are_refused_by_name():
    config = {**shortened("qwen3-32b"), "architectures": ["MambaForCausalLM"]}
    with pytest.raises(CheckpointError, match="MambaForCausalLM.*this version serves"):
        Checker(config, num_workers=1).arithmetic(
            engine_config_from_kwargs(model="x"), parse_topology("h100")
        )


def test_the_largest_step_is_kept_free():
    """A guess at the temporaries that is too small is replaced, as the engine does at its start."""
    engine = engine_config_from_kwargs(model="x")
    checked = Checker(shortened(LLAMA), num_workers=1).arithmetic(engine, parse_topology("h100"))
    needs = replace(checked.layout.needs, temp_bytes=10 * GIB)
    smaller = divide_memory(checked.layout._replace(needs=needs))
    assert checked.engine is not None
    assert smaller.limits.num_pages < checked.engine.limits.num_pages
