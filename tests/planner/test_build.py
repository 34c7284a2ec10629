"""Programs built ahead: a start with the same settings compiles nothing, one of others says why."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.core.limits import EngineLimits
from jaxinfer.errors import ConfigError, UserError
from jaxinfer.planner import build as build_module
from jaxinfer.planner.build import build_cache
from jaxinfer.planner.compile import divide_memory, lay_out
from jaxinfer.planner.devices import stand_ins
from jaxinfer.planner.messages import BuildRequest
from jaxinfer.planner.topologies import parse_topology
from jaxinfer.runner import program_store
from jaxinfer.runner.build import build_runner
from jaxinfer.runner.compiler import Program
from jaxinfer.runner.program_store import ProgramStore
from jaxinfer.runner.programs import CompiledPrograms
from jaxinfer.runner.runner import Programs
from tests.runner.tiny_llama import TinyLlama

CONFIG = Path(__file__).parent / "configs" / "llama-3.1-8b-instruct.json"
GIB = 2**30
AHEAD = engine_config_from_kwargs(model="x", max_model_len=8192)
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


def test_what_is_not_stored_is_no_success(tmp_path: Path):
    """Each error names what is missing and why; the last one repairs what the first found."""
    model, directory = TinyLlama().save(tmp_path / "model"), tmp_path / "cache"
    programs = directory / "programs"
    programs.mkdir(parents=True)
    programs.chmod(0o777)
    with pytest.raises(UserError, match=f"no program was stored: {programs} must be .*chmod 700"):
        build(model, directory)
    programs.chmod(0o700)
    assert build(model, directory).num_programs == 4
    for path in programs.glob("*.program"):
        path.unlink()
    with pytest.raises(UserError, match="4 of 4 programs are not stored") as caught:
        build(model, directory)
    message = str(caught.value)
    assert "write_slot: JAX's own cache had it" in message and "decode 1x1: JAX's" in message
    assert "an empty directory has no such cache" in message


def _with_temporaries(
    directory: Path, monkeypatch: pytest.MonkeyPatch, temps: list[int]
) -> tuple[str, list[int]]:
    """The flags that a build prints if XLA needs these bytes in turn, and the pages it tried."""
    pages: list[int] = []

    def compile_programs(
        config: Any, model: Any, limits: EngineLimits, arrays: Any, store: ProgramStore, *_: Any
    ) -> Any:
        assert not store.reads, "a program for a device that is not here cannot be loaded"
        assert config.cache.num_gpu_blocks_override == limits.num_pages
        pages.append(limits.num_pages)
        programs: Any = Programs(steps={}, write_slot=None, write_pages=None)  # type: ignore[arg-type]
        return CompiledPrograms(programs, temps[len(pages) - 1])

    monkeypatch.setattr(build_module, "compile_programs", compile_programs)
    monkeypatch.setattr(build_module, "target_devices", lambda t: stand_ins(t.num_devices))
    request = BuildRequest(
        config_path=str(CONFIG), engine=AHEAD, topology="h100", directory=str(directory / "cache")
    )
    return build_cache(request).serve_flags, pages


def test_a_step_larger_than_was_guessed_is_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As a start does: fewer pages, and all programs for them; not an error."""
    flags, (guessed, planned) = _with_temporaries(tmp_path, monkeypatch, [20 * GIB, 19 * GIB])
    assert f"--num-gpu-blocks-override {planned}" in flags
    config_json = json.loads(CONFIG.read_text("utf-8"))
    engine = divide_memory(lay_out(config_json, AHEAD, parse_topology("h100"), stand_ins(1)))
    assert guessed == engine.limits.num_pages
    shorter_bytes = (guessed - planned) * engine.memory.page_bytes
    assert shorter_bytes == pytest.approx(
        20 * GIB - engine.memory.temp_bytes, abs=engine.memory.page_bytes
    )


def test_a_step_that_fits_all_the_same_is_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags, (pages,) = _with_temporaries(tmp_path, monkeypatch, [1])
    assert f"--num-gpu-blocks-override {pages}" in flags


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
