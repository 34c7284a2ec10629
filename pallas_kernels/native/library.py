"""The C++ kernels for CPUs: compiled once for this machine, then called from XLA programs.

They are optional. Compiling at first use, not at install, lets the compiler use what this machine's
processor has; the result is kept in a directory that the caller names. Where there is no compiler,
libraries that were shipped serve (`pallas_kernels/native/prebuild.py` makes them), else the XLA
implementations, and the reason is given. Knows no kernels' meaning.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

from pallas_kernels.native.levels import Level, levels_of, processor_features

SHIPPED = Path(__file__).parent / "shipped"
"""Where libraries lie that were compiled for other machines than that of the compiler."""

_DIRECTORY = Path(__file__).parent
_HEADERS = tuple(_DIRECTORY / name for name in ("pairs.h", "parallel.h", "vec.h"))
_HEAD_DIM_STEP = 32  # two vectors of the widest registers
_MAX_HEAD_DIM = 256
PAGE_BITS = {"float32": 32, "bfloat16": 16}
"""Values of KV pages that paged_attention.cc can be compiled for."""
# Not -ffast-math: infinities and NaN must behave. Not -fassociative-math: the compiler would trade
# fused multiply-adds for products and sums that do not fit the registers (a third of the speed).
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
    "-w",  # the FFI headers' own warnings
)
_COMPILE_TIMEOUT_S = 300


class NativeMatmul(NamedTuple):
    """matmul.cc, registered with XLA."""

    target: str  # its name there
    panel: int  # columns that it wants to lie together


class NativeAttention(NamedTuple):
    """paged_attention.cc, registered with XLA."""

    target: str  # its name there
    empty_pages_target: str  # of what makes its pages
    page_dtype: str  # the values it knows in them


class NativeKernels(NamedTuple):
    """The C++ kernels that can be called; None: not to be had, for the reason given."""

    paged_attention: NativeAttention | None
    paged_attention_reason: str
    matmul: NativeMatmul | None
    matmul_reason: str


def load_native_kernels(
    directory: Path,
    *,
    head_dim: int,
    page_dtype: str,
    macros: Sequence[str] = (),
    shipped: Path = SHIPPED,
) -> NativeKernels:
    """Compiles the kernels into `directory` unless they are there, and registers them with XLA.

    `page_dtype` names the type of the values in the KV pages. `macros` make the compiler take code
    meant for other processors: for tests.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="native") as pool:  # one compiler beside another
        later = pool.submit(_load_matmul, directory, macros, shipped)
        attention, attention_reason = _load_attention(
            directory, head_dim, page_dtype, macros, shipped
        )
        matmul, matmul_reason = later.result()
    return NativeKernels(attention, attention_reason, matmul, matmul_reason)


def _load_attention(
    directory: Path, head_dim: int, page_dtype: str, macros: Sequence[str], shipped: Path
) -> tuple[NativeAttention | None, str]:
    if head_dim % _HEAD_DIM_STEP or head_dim > _MAX_HEAD_DIM:
        return None, (
            f"head size {head_dim} is not a multiple of {_HEAD_DIM_STEP} up to {_MAX_HEAD_DIM}"
        )
    if page_dtype not in PAGE_BITS:
        return None, f"{page_dtype} pages are not {' or '.join(PAGE_BITS)}"
    macros = (*attention_macros(head_dim, page_dtype), *macros)
    try:
        found = _find(directory, "paged_attention", macros, shipped)
        library = ctypes.CDLL(str(found.path))
    except (OSError, BuildError) as error:
        return None, str(error)
    target = "_".join(("jaxinfer_paged_attention", *macros))
    empty_pages_target = "_".join(("jaxinfer_empty_pages", *macros))
    _register(target, library.JaxinferPagedAttention)
    _register(empty_pages_target, library.JaxinferEmptyPages)
    return NativeAttention(target, empty_pages_target, page_dtype), found.why


def _load_matmul(
    directory: Path, macros: Sequence[str], shipped: Path
) -> tuple[NativeMatmul | None, str]:
    try:
        found = _find(directory, "matmul", macros, shipped)
        library = ctypes.CDLL(str(found.path))
    except (OSError, BuildError) as error:
        return None, str(error)
    target = "_".join(("jaxinfer_matmul", *macros))
    _register(target, library.JaxinferMatmul)
    return NativeMatmul(target, library.JaxinferMatmulPanel()), found.why


def _register(target: str, function: object) -> None:
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")


class BuildError(Exception):
    """There is no library; the text says why."""


class _Found(NamedTuple):
    """A library, and in words what its compiler was told of the processor."""

    path: Path
    why: str


def _find(directory: Path, name: str, macros: Sequence[str], shipped: Path) -> _Found:
    """A library compiled here, now or before, else the best of those shipped."""
    try:
        return _Found(build_library(directory, name, macros), "C++ compiled for this processor")
    except (OSError, BuildError):
        features = processor_features()
        for level in levels_of():
            path = shipped / library_file_name(name, macros, level)
            if level.runs_on(features) and path.exists():
                return _Found(path, f"C++ compiled for {level.name}")
        raise


def attention_macros(head_dim: int, page_dtype: str) -> tuple[str, ...]:
    """What paged_attention.cc is compiled with."""
    return f"JAXINFER_HEAD_DIM={head_dim}", f"JAXINFER_PAGE_BITS={PAGE_BITS[page_dtype]}"


def _flags(macros: Sequence[str], level: Level | None) -> tuple[str, ...]:
    """The compiler's; no level: for the processor that it runs on."""
    target = ("-march=native",) if level is None else level.flags
    return (*_FLAGS, *target, *(f"-D{macro}" for macro in macros))


def library_file_name(name: str, macros: Sequence[str], level: Level | None) -> str:
    """Says all that the library is made from, so that none is taken for another."""
    processor = _processor() if level is None else ""
    flags = _flags(macros, level)
    key = hashlib.sha256("\0".join((*flags, jax.__version__, processor)).encode())
    for file in (_DIRECTORY / f"{name}.cc", *_HEADERS):
        key.update(file.read_bytes())
    return f"{name}-{key.hexdigest()[:16]}.so"


def build_library(
    directory: Path, name: str, macros: Sequence[str], level: Level | None = None
) -> Path:
    """`name`.cc compiled for a level or for this processor, if it is not yet. Raises BuildError.

    Safe beside other processes that do the same: the last rename wins.
    """
    path = directory / library_file_name(name, macros, level)
    if path.exists():
        return path
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler (c++, g++ or clang++) was found")
    source = _DIRECTORY / f"{name}.cc"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        output = Path(scratch) / path.name
        command = [compiler, *_flags(macros, level), f"-I{jax.ffi.include_dir()}"]
        command += [str(source), "-o", str(output)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler} took more than {_COMPILE_TIMEOUT_S} s") from None
        if done.returncode != 0:
            last_line = done.stderr.strip().rpartition("\n")[2]
            raise BuildError(f"{compiler} failed: {last_line}")
        os.replace(output, path)
    return path


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
