"""What scripts/check_targets compiles: models on machines, steps, kernels. Data only; no JAX."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from jaxinfer.runner.buckets import Bucket

CONFIGS = Path(__file__).parents[2] / "tests" / "planner" / "configs"
MODELS = {
    "Llama-3.2-1B": "llama-3.2-1b-instruct.json",
    "Llama-3.1-8B": "llama-3.1-8b-instruct.json",
    "Llama-3.3-70B": "llama-3.3-70b-instruct.json",
    "Qwen3-32B": "qwen3-32b.json",
}
STEPS = {
    "decode": Bucket(num_tokens=64, num_seqs=64, decode_only=True),
    "mixed": Bucket(num_tokens=512, num_seqs=64, decode_only=False),
    "prefill": Bucket(num_tokens=2048, num_seqs=64, decode_only=False),
}
SETTINGS = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 16384}

_TENSORS: dict[str, dict[str, tuple[int, ...]]] = {
    "Llama-3.2-1B": {
        "v5e:1x1": (1,), "v5e:2x2": (4,), "v6e:1x1": (1,), "v6e:2x2": (4,),
        "a100-80g": (1,), "h100": (1,), "b200": (1,),
    },
    "Llama-3.1-8B": {
        "v5e:2x2": (2, 4), "v5e:2x4": (8,), "v6e:1x1": (1,), "v6e:2x2": (2, 4), "v6e:2x4": (8,),
        "v5p:1x1x1": (1,), "v5p:2x2x1": (4,), "tpu7x:1x1x1": (1, 2), "tpu7x:2x2x1": (8,),
        "a100-80g": (1,), "h100": (1,), "h100x8": (4, 8), "b200": (1,),
    },
    "Llama-3.3-70B": {
        "v6e:2x4": (8,), "v5p:2x2x1": (4,), "tpu7x:2x2x1": (4, 8),
        "a100-80gx8": (8,), "h100x8": (4, 8), "b200x8": (2,),
    },
    "Qwen3-32B": {
        "v5e:2x4": (8,), "v6e:2x2": (4,), "v6e:2x4": (8,), "v5p:2x2x1": (2, 4),
        "tpu7x:1x1x1": (2,), "tpu7x:2x2x1": (4,),
        "a100-80gx8": (2,), "h100x8": (2,), "b200": (1,),
    },
}  # fmt: skip
"""Machine -> devices that a layer is split over, where the model fits and one would do it."""


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A step of a model on a machine."""

    topology: str
    model: str
    tensor: int
    step: str

    @property
    def name(self) -> str:
        return f"{self.topology} | {self.model} TP={self.tensor} | {self.step}"

    @property
    def bucket(self) -> Bucket:
        return STEPS[self.step]

    @property
    def config_json(self) -> dict[str, Any]:
        return json.loads((CONFIGS / MODELS[self.model]).read_text())


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """An attention layer on one device, and a step."""

    name: str
    num_kv_heads: int
    group: int
    head_dim: int
    dtype: str = "bfloat16"
    page_dtype: str = "bfloat16"
    page_size: int = 32
    decode_only: bool = False
    window: int | None = None
    soft_cap: float | None = None
    has_scales: bool = False
    num_tokens: int = 512
    num_seqs: int = 64
    num_columns: int = 512  # of the page table
    num_pages: int = 2048


KERNEL_TOPOLOGIES = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1", "a100-80g", "h100", "b200")


def kernel_cases() -> Iterator[KernelCase]:
    """Head sizes and dtypes, with a window and scales for the quantized ones; long tables."""
    for head_dim, dtype in product((64, 128, 256), ("bfloat16", "int8", "float8_e4m3fn")):
        yield KernelCase(
            name=f"H{head_dim} {dtype}",
            num_kv_heads=512 // head_dim,
            group=4,
            head_dim=head_dim,
            page_dtype=dtype,
            window=1024,
            has_scales=dtype != "bfloat16",
        )
    yield KernelCase(
        name="H128 float32",
        num_kv_heads=2,
        group=4,
        head_dim=128,
        dtype="float32",
        page_dtype="float32",
        soft_cap=30.0,
    )
    yield KernelCase(name="MHA", num_kv_heads=32, group=1, head_dim=128, num_pages=512)
    yield KernelCase(name="MQA, page 16", num_kv_heads=1, group=8, head_dim=128, page_size=16)
    for decode_only in (True, False):
        yield KernelCase(
            name="decodes, 256 x 128k" if decode_only else "mixed, 256 x 128k",
            num_kv_heads=2,
            group=4,
            head_dim=128,
            page_size=16,
            decode_only=decode_only,
            num_tokens=256 if decode_only else 2048,
            num_seqs=256,
            num_columns=8192,
            num_pages=16384,
        )


FAST = (
    StepCase(topology="v6e:2x2", model="Llama-3.2-1B", tensor=4, step="decode"),
    StepCase(topology="v6e:2x4", model="Llama-3.1-8B", tensor=8, step="decode"),
    StepCase(topology="v5e:2x2", model="Llama-3.1-8B", tensor=4, step="decode"),
)
"""What every change must pass."""


def step_cases(
    *, models: list[str], topologies: list[str], steps: list[str], tensors: list[int]
) -> Iterator[StepCase]:
    """Those of the grid that are named; an empty list names all."""
    for model, machines in _TENSORS.items():
        for topology, counts in machines.items():
            for tensor, step in product(counts, STEPS):
                case = StepCase(topology=topology, model=model, tensor=tensor, step=step)
                if all(
                    value in wanted or not wanted
                    for value, wanted in (
                        (model, models),
                        (topology, topologies),
                        (step, steps),
                        (tensor, tensors),
                    )
                ):
                    yield case
