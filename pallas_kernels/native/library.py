"""The C++ kernels for CPUs: compiled once for this machine, then called from XLA programs.

They are optional. Where there is no compiler the XLA implementations serve, and the reason is
given. Compiling at first use, not at install, lets the compiler use what this machine's processor
has; the result is kept in a directory that the caller names. Knows no kernels' meaning.
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

_DIRECTORY = Path(__file__).parent
_HEADERS = tuple(_DIRECTORY / name for name in ("pairs.h", "parallel.h", "vec.h"))
_HEAD_DIM_STEP = 32  # two vectors of the widest registers
_MAX_HEAD_DIM = 256
# Not -ffast-math: infinities and NaN must behave.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
    "-w",  # the FFI headers' own warnings
)
# Sums over a head may be reordered. The product's must not: the compiler would trade its fused
# multiply-adds for products and sums that do not fit the registers (a third of the speed).
_FLAGS_OF = {"paged_attention": ("-fassociative-math",), "matmul": ()}
_COMPILE_TIMEOUT_S = 300


class NativeMatmul(NamedTuple):
    """matmul.cc, registered with XLA."""

    target: str  # its name there
    panel: int  # columns that it wants to lie together


class NativeKernels(NamedTuple):
    """The C++ kernels that can be called; None: not to be had, for the reason given."""

    paged_attention: str | None  # the target's name in XLA
    paged_attention_reason: str
    matmul: NativeMatmul | None
    matmul_reason: str


def load_native_kernels(
    directory: Path, *, head_dim: int, macros: Sequence[str] = ()
) -> NativeKernels:
    """Compiles the kernels into `directory` unless they are there, and registers them with XLA.

    `macros` make the compiler take code meant for other processors: for tests.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="native") as pool:  # one compiler beside another
        later = pool.submit(_load_matmul, directory, macros)
        attention, attention_reason = _load_attention(directory, head_dim, macros)
        matmul, matmul_reason = later.result()
    return NativeKernels(attention, attention_reason, matmul, matmul_reason)


_WHY = "C++ compiled for this processor"


def _load_attention(
    directory: Path, head_dim: int, macros: Sequence[str]
) -> tuple[str | None, str]:
    if head_dim % _HEAD_DIM_STEP or head_dim > _MAX_HEAD_DIM:
        return None, (
            f"head size {head_dim} is not a multiple of {_HEAD_DIM_STEP} up to {_MAX_HEAD_DIM}"
        )
    macros = (f"JAXINFER_HEAD_DIM={head_dim}", *macros)
    try:
        library = ctypes.CDLL(str(_build(directory, "paged_attention", macros)))
    except (OSError, _BuildError) as error:
        return None, str(error)
    target = "_".join(("jaxinfer_paged_attention", *macros))
    _register(target, library.JaxinferPagedAttention)
    return target, _WHY


def _load_matmul(directory: Path, macros: Sequence[str]) -> tuple[NativeMatmul | None, str]:
    try:
        library = ctypes.CDLL(str(_build(directory, "matmul", macros)))
    except (OSError, _BuildError) as error:
        return None, str(error)
    target = "_".join(("jaxinfer_matmul", *macros))
    _register(target, library.JaxinferMatmul)
    return NativeMatmul(target, library.JaxinferMatmulPanel()), _WHY


def _register(target: str, function: object) -> None:
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")


class _BuildError(Exception):
    """There is no library; the text says why."""


def _build(directory: Path, name: str, macros: Sequence[str]) -> Path:
    """The library's path. Safe beside other processes that do the same: the last rename wins."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    source = _DIRECTORY / f"{name}.cc"
    flags = (*_FLAGS, *_FLAGS_OF[name], *(f"-D{macro}" for macro in macros))
    key = hashlib.sha256("\0".join((*flags, jax.__version__, _processor())).encode())
    for file in (source, *_HEADERS):
        key.update(file.read_bytes())
    path = directory / f"{name}-{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    if compiler is None:
        raise _BuildError("no C++ compiler (c++, g++ or clang++) was found")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        output = Path(scratch) / path.name
        command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(output)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise _BuildError(f"{compiler} took more than {_COMPILE_TIMEOUT_S} s") from None
        if done.returncode != 0:
            last_line = done.stderr.strip().rpartition("\n")[2]
            raise _BuildError(f"{compiler} failed: {last_line}")
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
