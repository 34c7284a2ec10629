"""`bench throughput`: what it feeds the engine."""

from dataclasses import replace

import pytest

from jaxinfer.bench import throughput
from jaxinfer.bench.workloads import Workload
from jaxinfer.config.schema import EngineConfig, ModelConfig

WORKLOADS = (Workload(2, 8, 1), Workload(4, 8, 1), Workload(1, 24, 1))


class _Engine:
    """Stands for LLM: keeps the prompts, answers with as many tokens as were asked for."""

    prompts: list[tuple[int, ...]]

    def __init__(self, **settings: object) -> None:
        type(self).prompts = []
        self.info = type("Info", (), {"max_model_len": 64, "dtype": "float32", "device": "cpu"})

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def get_tokenizer(self) -> object:
        return type("Tokenizer", (), {"vocab_size": 1000})

    def generate(self, prompts: list[dict], params: object, *, use_tqdm: bool) -> list[object]:
        self.prompts.extend(tuple(prompt["prompt_token_ids"]) for prompt in prompts)
        tokens = range(params.max_tokens)  # type: ignore[attr-defined]
        completion = type("Completion", (), {"token_ids": list(tokens)})
        return [type("Output", (), {"outputs": [completion]}) for _ in prompts]


def test_no_prompt_begins_like_one_before_it(monkeypatch: pytest.MonkeyPatch):
    """A prefix cache would skip what it has seen, and engines differ in how much they find."""
    monkeypatch.setattr(throughput, "LLM", _Engine)
    config = replace(EngineConfig(), model=ModelConfig(model="m", seed=3))
    rows = list(throughput.measure_all(config, WORKLOADS, num_runs=2))
    assert [row["n"] for row in rows] == [2, 4, 1]
    measured = _Engine.prompts[2:]  # after the warm-up
    assert len(measured) == 2 * (2 + 4 + 1)
    assert len({prompt[:8] for prompt in measured}) == len(measured)
