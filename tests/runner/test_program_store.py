"""A second start reads its programs; whatever is wrong with an entry, the engine starts."""

import errno
import hashlib
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import Admission
from jaxinfer.errors import UserError
from jaxinfer.runner import program_store
from jaxinfer.runner.compiler import (
    CompileCounter,
    Program,
    compile_all,
    compiler_options,
    enable_persistent_cache,
)
from jaxinfer.runner.program_store import open_store
from tests.runner.conftest import MakeRunner
from tests.runner.steps import make_seq, make_step
from tests.runner.tiny_llama import TinyLlama

_FACTS = {"model": {"num_layers": 2}}
_X = jnp.arange(6, dtype=jnp.float32)


@pytest.fixture
def counter() -> CompileCounter:
    return CompileCounter()


@pytest.fixture(autouse=True)
def sources_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing them while the tests run."""
    digest = program_store._digest_of_sources()
    monkeypatch.setattr(program_store, "_digest_of_sources", lambda: digest)


def _count(
    directory: Path,
    counter: CompileCounter,
    *,
    facts: Mapping[str, Any] = _FACTS,
    name: str = "scale",
    size: int = 6,
    donate: tuple[int, ...] = (),
) -> int:
    """How many programs are compiled (or read from JAX's cache) to get one; it is run."""
    program = Program(
        function=lambda tree: {"y": tree["x"] * 3},
        args=({"x": jax.ShapeDtypeStruct((size,), jnp.float32)},),
        donate=donate,
    )
    enable_persistent_cache(str(directory))
    counter.mark_ready()
    compiled = compile_all(
        {name: program},
        compiler_options("cpu", num_workers=2),
        num_workers=1,
        on_done=lambda done, total: None,
        store=open_store(str(directory), jax.devices()[:1], facts),
    )[name]
    num_compiled = counter.num_after_ready
    if size == 6:
        x = jnp.copy(_X)
        np.testing.assert_array_equal(compiled({"x": x})["y"], 3 * _X)
        assert x.is_deleted() == bool(donate)
        assert compiled.memory_analysis() is not None
    return num_compiled


def _compile_into(directory: Path, *, reads: bool = True) -> program_store.ProgramStore | None:
    """The store after one program was compiled for it."""
    enable_persistent_cache(str(directory))
    store = open_store(str(directory), jax.devices()[:1], _FACTS, reads=reads)
    program = Program(
        function=lambda x: x * 3, args=(jax.ShapeDtypeStruct((6,), jnp.float32),), donate=()
    )
    compile_all(
        {"scale": program},
        compiler_options("cpu", num_workers=2),
        num_workers=1,
        on_done=lambda done, total: None,
        store=store,
    )
    return store


def _entry(directory: Path) -> Path:
    (path,) = directory.glob("programs/*.program")
    return path


@pytest.mark.parametrize("donate", [(), (0,)])
def test_the_second_time_nothing_is_compiled(tmp_path, counter, donate):
    assert _count(tmp_path, counter, donate=donate) == 1
    assert _count(tmp_path, counter, donate=donate) == 0


@pytest.mark.parametrize(
    "other",
    [
        {"facts": {"model": {"num_layers": 3}}},
        {"facts": _FACTS | {"settings": 1}},
        {"name": "other"},
        {"size": 7},
        {"donate": (0,)},
    ],
    ids=str,
)
def test_another_program_is_not_taken_for_it(tmp_path, counter, other):
    _count(tmp_path, counter)
    assert _count(tmp_path, counter, **other) == 1


def test_other_sources_and_versions_are_not_taken_for_these(tmp_path, counter, monkeypatch):
    _count(tmp_path, counter)
    for name, value in (("_digest_of_sources", "new code"), ("version", "9.9"), ("_processor", "")):
        with monkeypatch.context() as patch:
            patch.setattr(program_store, name, lambda *_args, value=value: value)
            assert _count(tmp_path, counter) == 1, name
    assert _count(tmp_path, counter) == 0


def test_a_store_for_devices_that_are_not_here_reads_nothing(tmp_path, counter):
    """And takes what is there for no damage."""
    _compile_into(tmp_path)
    counter.mark_ready()
    _compile_into(tmp_path)
    assert counter.num_after_ready == 0
    written = _entry(tmp_path).stat().st_mtime_ns
    _compile_into(tmp_path, reads=False)
    assert counter.num_after_ready == 1
    assert _entry(tmp_path).stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("serialize", "it cannot be serialized: no such thing here"),
        ("replace", "it cannot be written: .*No space left"),
        ("gone", "its file is gone again"),
    ],
)
def test_who_must_store_hears_what_was_not(tmp_path, monkeypatch, what: str, why: str):
    def no_serializer(*_args: Any) -> None:
        raise ValueError("no such thing here")

    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "serialize":
        monkeypatch.setattr(program_store.serialize_executable, "serialize", no_serializer)
    if what == "replace":
        monkeypatch.setattr(program_store.os, "replace", full)
    store = _compile_into(tmp_path)
    assert store is not None
    if what == "gone":
        _entry(tmp_path).unlink()
    with pytest.raises(UserError, match=f"1 of 1 programs are not stored in .*\n  scale: {why}"):
        store.check_kept()


def _clear_cache_of_jax(directory: Path) -> None:
    for path in directory.glob("*-cache"):
        path.unlink()


def _no_space(*_args: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def _flip(content: bytes) -> bytes:
    """One bit in the midst of the machine code."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _foreign(content: bytes) -> bytes:
    """Whole, but not from this JAX."""
    del content
    payload = pickle.dumps((b"no executable", None, None))
    return program_store._MAGIC + hashlib.sha256(payload).digest() + payload


@pytest.mark.parametrize(
    "damage", [_flip, _foreign, lambda content: content[:100], lambda _: b"", lambda _: b"x" * 999]
)
def test_a_bad_entry_is_compiled_again_and_replaced(tmp_path, counter, caplog, damage):
    _count(tmp_path, counter)
    path = _entry(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    _clear_cache_of_jax(tmp_path)
    with caplog.at_level(logging.WARNING, logger="jaxinfer"):
        assert _count(tmp_path, counter) == 1
    assert str(path) in caplog.text
    assert _count(tmp_path, counter) == 0


def test_what_comes_from_the_cache_of_jax_is_not_stored(tmp_path, counter):
    """It could not be run once it is read back."""
    _count(tmp_path, counter)
    _entry(tmp_path).unlink()
    for _ in range(2):
        assert _count(tmp_path, counter) == 1
    assert not list(tmp_path.glob("programs/*.program"))
    _clear_cache_of_jax(tmp_path)
    assert _count(tmp_path, counter) == 1
    assert _count(tmp_path, counter) == 0


def test_a_directory_that_cannot_be_written_costs_a_compilation_only(tmp_path, counter, caplog):
    _count(tmp_path, counter)
    _entry(tmp_path).unlink()
    _clear_cache_of_jax(tmp_path)
    with caplog.at_level(logging.WARNING, logger="jaxinfer"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_store.os, "replace", _no_space)
        assert _count(tmp_path, counter) == 1
    assert "no space left" in caplog.text
    assert not list(tmp_path.glob("programs/*.program")) + list(tmp_path.glob("programs/*.tmp"))


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_directory_that_others_can_write_is_not_trusted(tmp_path, counter, caplog, mode):
    _count(tmp_path, counter)
    (tmp_path / "programs").chmod(mode)
    with caplog.at_level(logging.WARNING, logger="jaxinfer"):
        assert _count(tmp_path, counter) == 1
    assert f"{tmp_path}/programs must be a directory of this user" in caplog.text
    (tmp_path / "programs").chmod(0o700)
    assert _count(tmp_path, counter) == 0


def test_a_link_to_a_directory_is_not_trusted(tmp_path, counter, caplog):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "programs").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, logger="jaxinfer"):
        assert _count(tmp_path, counter) == 1
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_root_put_there_is_trusted_and_what_another_user_did_is_not(
    tmp_path, counter, monkeypatch
):
    """As in a container that runs as any user id."""
    _count(tmp_path, counter)
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(program_store.os, "geteuid", lambda: owner + 1)
    store = open_store(str(tmp_path), jax.devices()[:1], _FACTS)
    assert (store is not None) == (owner == 0)


def test_programs_of_other_settings_are_no_reason_to_warn(tmp_path, counter, caplog):
    """But programs of the same engine and of other versions are: see planner/test_build.py."""
    _count(tmp_path, counter)
    caplog.set_level("INFO", logger="jaxinfer")
    open_store(str(tmp_path), jax.devices()[:1], {"model": {"num_layers": 3}})
    (said,) = [record for record in caplog.records if "are ignored" in record.message]
    assert said.levelname == "INFO"
    assert "theirs is another model: {'num_layers': 2} (here {'num_layers': 3})" in said.message
    caplog.clear()
    open_store(str(tmp_path), jax.devices()[:1], _FACTS)
    assert not caplog.records


def test_the_directory_is_private(tmp_path, counter):
    _count(tmp_path, counter)
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700


def test_the_programs_used_last_stay(tmp_path, counter, monkeypatch):
    monkeypatch.setattr(program_store, "_MOST_ENTRIES", 2)
    for size in (6, 7, 8):
        _count(tmp_path, counter, size=size)
        for age_s, path in enumerate(sorted(tmp_path.glob("programs/*.program"), key=_age)):
            os.utime(path, (1e9 + age_s, 1e9 + age_s))
    assert _count(tmp_path, counter, size=8) == 0
    assert len(list(tmp_path.glob("programs/*.program"))) == 2
    assert len(list(tmp_path.glob("programs/*.origin"))) == 1


def _age(path: Path) -> float:
    return path.stat().st_mtime


def test_none_keeps_nothing():
    assert open_store("none", jax.devices()[:1], _FACTS) is None


def test_a_second_engine_compiles_nothing(
    make_runner: MakeRunner, tiny: TinyLlama, tiny_dir: Path, tmp_path: Path, monkeypatch
):
    def refuse(*_args: Any) -> None:
        raise AssertionError("compiled what the first engine had compiled")

    few = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "token_buckets": [16]}
    make_runner(tiny_dir, compile_cache=str(tmp_path), **few)
    monkeypatch.setattr(Program, "compile", refuse)
    runner = make_runner(tiny_dir, compile_cache=str(tmp_path), num_compile_workers=1, **few)
    prompt = [3, 4, 5]
    admission = Admission(
        sampling=SamplingParams(temperature=0.0), prompt_token_ids=prompt, output_token_ids=[]
    )
    seq = msgspec.structs.replace(make_seq(0, prompt, new_pages=(0,)), admission=admission)
    output = runner.dispatch(make_step([seq])).result()
    assert output.seqs[0].token_ids == [int(np.argmax(tiny.logits(prompt)[-1]))]
