"""Engines over a tiny random model; compiled programs are kept in pytest's cache directory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.core.progress import ignore_progress
from jaxinfer.runner.build import build_runner
from jaxinfer.runner.runner import Runner
from tests.runner.tiny_llama import TinyLlama

MakeRunner = Callable[..., Runner]


@pytest.fixture(scope="session")
def engine_args(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Four sequences, steps of at most 32 tokens, 96 tokens of context: three step shapes."""
    assert request.config.cache is not None
    return {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "token_buckets": [32],
        "block_size": 8,
        "max_model_len": 96,
        "compile_cache": str(request.config.cache.mkdir("compiled")),
    }


@pytest.fixture(scope="session")
def make_runner(engine_args: dict[str, Any]) -> Iterator[MakeRunner]:
    """Builds runners and closes them at the end."""
    runners = []

    def make(model: Path, **overrides: Any) -> Runner:
        config = engine_config_from_kwargs(model=str(model), **{**engine_args, **overrides})
        runners.append(build_runner(config, ignore_progress))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


@pytest.fixture(scope="session")
def tiny() -> TinyLlama:
    return TinyLlama()


@pytest.fixture(scope="session")
def tiny_dir(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def runner(make_runner: MakeRunner, tiny_dir: Path) -> Runner:
    return make_runner(tiny_dir)
