"""Writes the table of docs/results/plans.md: plans by arithmetic of known models and machines.

    .venv/bin/python scripts/plan_figures.py [MODEL ...]

Compiles nothing. The models' config.json lie in tests/planner/configs.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported

import sys
from pathlib import Path

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.planner.devices import prepare_stand_ins
from jaxinfer.planner.messages import PlanRequest, PlanResult
from jaxinfer.planner.plan import make_plan
from jaxinfer.planner.topologies import parse_topology

CONFIGS = Path(__file__).parents[1] / "tests" / "planner" / "configs"
MODELS = ("llama-3.1-8b-instruct", "granite-3.3-8b-instruct", "qwen3-32b", "llama-3.3-70b-instruct")
MACHINES = (
    ("v5e:1x1", 1), ("v5e:2x2", 4), ("v5e:2x4", 8), ("v5e:4x4", 16),
    ("v6e:1x1", 1), ("v6e:2x2", 4), ("v6e:2x4", 8),
    ("tpu7x:1x1x1", 2), ("tpu7x:2x2x1", 8),
    ("h100", 1), ("h100x2", 2), ("h100x4", 4), ("h100x8", 8),
    ("h200", 1), ("h200x2", 2), ("h200x4", 4), ("h200x8", 8),
)  # fmt: skip
MAX_MODEL_LEN = 16384
HEADER = (
    "| model | machine | TP | weights GiB | cache GiB | tokens | of 1k | of 8k | of 16k "
    "| batch 1 tok/s | most tok/s (batch) |\n" + "| --- " * 11 + "|"
)


def plan(model: str, topology: str, tensor: int) -> PlanResult:
    path = str(CONFIGS / f"{model}.json")
    engine = engine_config_from_kwargs(
        model=path, tensor_parallel_size=tensor, max_model_len=MAX_MODEL_LEN
    )
    return make_plan(
        PlanRequest(
            config_path=path,
            engine=engine,
            topology=topology,
            sweep=False,
            compile=False,
            price_per_hour=None,
            input_len=1000,
            output_len=1000,
        )
    )


def row(model: str, result: PlanResult) -> str:
    start = f"| {model} | {result.topology} | {result.tensor_parallel_size} "
    if not result.fits:
        fits = next((item.flags for item in result.alternatives), "nothing that was tried")
        return f"{start}| does not fit; would: `{fits}` |" + " |" * 7
    memory = result.memory
    tokens = memory.num_pages * memory.page_size
    held = [f"{item.num_seqs:.1f}" for item in result.concurrency]
    best = max((item for item in result.decode if item.fits), key=lambda item: item.batch)
    return (
        f"{start}| {memory.weight_bytes / 2**30:.2f} | {memory.kv_bytes / 2**30:.2f} | {tokens} "
        f"| {' | '.join(held)} | {result.decode[0].tokens_per_s:.0f} "
        f"| {best.output_tokens_per_s:.0f} ({best.batch}) |"
    )


def main() -> None:
    prepare_stand_ins(parse_topology("v5e:4x4"))
    print(HEADER)
    for model in sys.argv[1:] or MODELS:
        for topology, tensor in MACHINES:
            print(row(model, plan(model, topology, tensor)), flush=True)


if __name__ == "__main__":
    main()
