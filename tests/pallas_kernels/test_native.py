"""Libraries that were compiled elsewhere: which are taken, and that they compute."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer.config.env import cache_dir
from pallas_kernels.matmul.cpu import PanelMatmul
from pallas_kernels.native.levels import Level, levels_of, processor_features
from pallas_kernels.native.library import (
    BuildError,
    build_library,
    library_file_name,
    load_native_kernels,
)

MACROS = ("JAXINFER_SHIPPED",)  # makes the target's name in XLA another than the other tests'
HASWELL = "fpu sse2 abm avx avx2 bmi1 bmi2 f16c fma movbe"
SKYLAKE = f"{HASWELL} avx512f avx512bw avx512cd avx512dq avx512vl"


def usable(features: frozenset[str]) -> list[Level]:
    return [level for level in levels_of() if level.runs_on(features)]


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        (f"{SKYLAKE} avx512_bf16", "x86-64-v4 with bfloat16"),
        (SKYLAKE, "x86-64-v4"),
        (f"{HASWELL} avx512f", "x86-64-v3"),
        (HASWELL, "x86-64-v3"),
        ("fpu sse2", None),
    ],
)
def test_the_best_level_comes_first(flags: str, best: str | None, tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n" * 2)
    features = processor_features(cpuinfo)
    assert features == set(flags.split())
    found = (level.name for level in levels_of("x86_64") if level.runs_on(features))
    assert next(found, None) == best


def test_a_processor_that_says_nothing_gets_nothing(tmp_path: Path):
    assert processor_features(tmp_path / "absent") == frozenset()
    assert levels_of("riscv64") == ()


def test_names_tell_levels_and_processors_apart():
    levels = (None, *levels_of("x86_64"), *levels_of("aarch64"))
    assert len({library_file_name("matmul", (), level) for level in levels}) == len(levels)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def shipped() -> Path:
    """With the product, for the best level of this machine; compiled once, as the other tests'."""
    levels = usable(processor_features())
    if not levels:
        pytest.skip("nothing is shipped for this processor")
    directory = cache_dir() / "native" / "shipped"
    try:
        build_library(directory, "matmul", MACROS, levels[0])
    except BuildError as error:
        pytest.skip(str(error))
    return directory


def test_a_shipped_library_serves_where_there_is_no_compiler(
    shipped: Path, no_compiler: None, tmp_path: Path
):
    native = load_native_kernels(
        tmp_path / "own", head_dim=32, page_dtype="float32", macros=MACROS, shipped=shipped
    )
    assert native.matmul is not None
    assert native.matmul_reason == f"C++ compiled for {usable(processor_features())[0].name}"
    assert native.paged_attention is None  # none was shipped
    assert "no C++ compiler" in native.paged_attention_reason
    matmul = PanelMatmul(target=native.matmul.target, panel=native.matmul.panel, dtype="float32")
    x, weight = np.random.default_rng(0).normal(size=(2, 7, 40)).astype(np.float32)
    product = jax.jit(lambda x, w, n: matmul(x, w, num_columns=40, num_rows=n))
    packed = matmul.pack(np.ascontiguousarray(weight.T @ weight))
    out = product(x, packed, np.int32(7))
    np.testing.assert_allclose(out, x @ (weight.T @ weight), rtol=1e-4, atol=1e-4)


def test_what_this_processor_cannot_run_is_not_taken(no_compiler: None, tmp_path: Path):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    unusable = [level for level in levels_of() if not level.runs_on(processor_features())]
    if not unusable:
        pytest.skip("this processor runs all levels")
    for level in unusable:  # no libraries at all: to load one would fail with another reason
        (shipped / library_file_name("matmul", MACROS, level)).touch()
    native = load_native_kernels(
        tmp_path / "own", head_dim=32, page_dtype="float32", macros=MACROS, shipped=shipped
    )
    assert native.matmul is None
    assert "no C++ compiler" in native.matmul_reason
