"""Building a runner: the order of its phases, and a memory plan that is checked, not believed."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.errors import CapacityError, CheckpointError
from jaxinfer.runner import sizing
from jaxinfer.runner.build import build_runner
from jaxinfer.runner.runner import Runner
from tests.runner.harness import Engine
from tests.runner.tiny_llama import TinyLlama

FITTING_PAGES = 24


@dataclass(kw_only=True)
class Build:
    """Builds a runner and remembers the progress that was reported."""

    engine_args: dict[str, Any]
    progress: list[tuple[str, int, int]] = field(default_factory=list)

    def __call__(self, model: Path, **overrides: Any) -> Runner:
        config = engine_config_from_kwargs(model=str(model), **{**self.engine_args, **overrides})
        return build_runner(config, lambda *event: self.progress.append(event))

    @property
    def num_compilations(self) -> int:
        return sum(event[:2] == ("compile", 0) for event in self.progress)


@pytest.fixture
def build(engine_args: dict[str, Any]) -> Build:
    return Build(engine_args=engine_args)


@pytest.fixture
def wrong_guess(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with room for FITTING_PAGES, and a guess at the temporaries that is far too low."""
    memory = runner.memory
    assert memory.temp_bytes > FITTING_PAGES * memory.page_bytes
    num_bytes = memory.total_bytes - memory.kv_bytes + FITTING_PAGES * memory.page_bytes
    monkeypatch.setattr(sizing, "available_cpu_bytes", lambda: num_bytes)
    monkeypatch.setattr(sizing, "estimate_temp_bytes", lambda **sizes: 0)


@pytest.mark.usefixtures("wrong_guess")
def test_a_wrong_guess_is_found_and_planned_again(build: Build, tiny_dir: Path, tiny: TinyLlama):
    """Automatic pages: fewer of them, compiled anew, and the engine works."""
    runner = build(tiny_dir, gpu_memory_utilization=1.0)
    assert build.num_compilations == 2
    assert runner.memory.fits
    assert runner.limits.num_pages == runner.memory.num_pages == FITTING_PAGES
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    assert Engine(runner).run([5, 6, 7], sampling).token_ids == tiny.greedy([5, 6, 7], 40)
    runner.close()


@pytest.mark.usefixtures("wrong_guess")
def test_pages_that_were_asked_for_are_not_silently_lowered(build: Build, tiny_dir: Path):
    with pytest.raises(CapacityError, match=f"At most {FITTING_PAGES} pages fit") as caught:
        build(tiny_dir, gpu_memory_utilization=1.0, num_gpu_blocks_override=48)
    found = re.search(r"--kv-cache-memory-bytes (\d+)", str(caught.value))
    assert found, caught.value
    assert build.num_compilations == 1


def test_a_plan_that_cannot_be_is_refused_before_anything_is_compiled(build: Build, tiny_dir: Path):
    with pytest.raises(CapacityError, match="--max-model-len 16 would fit"):
        build(tiny_dir, num_gpu_blocks_override=2)
    assert build.progress == []


def test_missing_weights_are_found_before_anything_is_compiled(build: Build, tmp_path: Path):
    model = TinyLlama()
    del model.weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"missing: tensor model\.layers\.1\.mlp\.up_proj"):
        build(model.save(tmp_path))
    assert build.progress == []


def test_phases_are_reported_in_order(build: Build, tiny_dir: Path):
    runner = build(tiny_dir)
    runner.close()
    phases = list(dict.fromkeys(phase for phase, _, _ in build.progress))
    assert phases == ["compile", "load weights", "allocate", "warm up"]
    for phase in phases[:2]:
        counts = [event[1:] for event in build.progress if event[0] == phase]
        total = counts[0][1]
        assert counts == [(done, total) for done in range(total + 1)]


def test_what_a_runner_says_of_itself(runner: Runner):
    assert runner.dtype == "float32"
    assert runner.vocab_size == 96
    assert runner.eos_token_ids == (1,)
    assert runner.device_name == "1 x cpu"
    assert runner.limits.num_pages == 48  # four sequences of 96 tokens, in pages of 8
    assert runner.memory.fits
    assert [str(bucket) for bucket in runner.buckets] == ["decode 1x1", "decode 4x4", "mixed 32x4"]
