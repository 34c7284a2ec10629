"""Programs built ahead: a start with the same settings compiles nothing, one of others says why."""

import logging
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.errors import ConfigError
from jaxinfer.planner.build import build_cache
from jaxinfer.planner.messages import BuildRequest
from jaxinfer.runner import program_store
from jaxinfer.runner.build import build_runner
from jaxinfer.runner.compiler import Program
from tests.runner.tiny_llama import TinyLlama

SETTINGS = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 16,
    "token_buckets": [16],
    "num_gpu_blocks_override": 8,
    "max_model_len": 64,
    "native_kernels": False,
}


@pytest.fixture(autouse=True)
def sources_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing them while the tests run."""
    digest = program_store._digest_of_sources()
    monkeypatch.setattr(program_store, "_digest_of_sources", lambda: digest)


def build(model: Path, directory: Path, topology: str = "cpu") -> Any:
    return build_cache(
        BuildRequest(
            config_path="",
            engine=engine_config_from_kwargs(model=str(model), **SETTINGS),
            topology=topology,
            directory=str(directory),
        )
    )


def start(model: Path, directory: Path) -> None:
    config = engine_config_from_kwargs(model=str(model), compile_cache=str(directory), **SETTINGS)
    build_runner(config, lambda phase, done, total: None).close()


def test_a_built_start_compiles_nothing_and_other_versions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    model, directory = TinyLlama().save(tmp_path / "model"), tmp_path / "cache"
    result = build(model, directory)
    assert result.num_programs == 4  # a decode and a mixed step, and two that write slots
    assert len(list(directory.glob("programs/*.program"))) == result.num_programs
    assert result.serve_flags == f"--compile-cache {directory}"

    misses = []

    def on_event(event: str, **kwargs: Any) -> None:
        if event == "/jax/compilation_cache/cache_misses":
            misses.append(event)

    def refuse(*_args: Any) -> None:
        raise AssertionError("compiled what was built")

    jax.monitoring.register_event_listener(on_event)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Program, "compile", refuse)
            start(model, directory)
        assert misses == [], "compiled something that is no step"
        before = sorted(directory.glob("programs/*.program"))
        real_version = program_store.version
        monkeypatch.setattr(
            program_store, "version", lambda name: "0.9" if name == "jaxlib" else real_version(name)
        )
        caplog.set_level(logging.INFO, logger="jaxinfer")
        start(model, directory)
    finally:
        jax.monitoring.unregister_event_listener(on_event)
    (said,) = [r for r in caplog.records if "are ignored" in r.message]
    assert said.levelno == logging.WARNING
    assert f"jaxlib: {real_version('jaxlib')} (here 0.9)" in said.message
    assert sorted(directory.glob("programs/*.program")) >= before


def test_virtual_devices_are_not_built_for(tmp_path: Path):
    with pytest.raises(ConfigError, match="topology='cpux2'.*Give cpu"):
        build_cache(
            BuildRequest(
                config_path="",
                engine=engine_config_from_kwargs(model="x"),
                topology="cpux2",
                directory=str(tmp_path),
            )
        )
