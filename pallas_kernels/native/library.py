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
from pathlib import Path
from typing import NamedTuple

import jax

_PAGED_ATTENTION = "jaxinfer_paged_attention"
_HEAD_DIM_STEP = 32  # two vectors of the widest registers
_MAX_HEAD_DIM = 256

_SOURCES = (Path(__file__).with_name("paged_attention.cc"),)
_SYMBOLS = {_PAGED_ATTENTION: "JaxinferPagedAttention"}
# Not -ffast-math: infinities and NaN must behave. Sums may be reordered, exceptions are not used.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
    "-w",  # the FFI headers' own warnings
)
_COMPILE_TIMEOUT_S = 300


class NativeKernels(NamedTuple):
    """Whether the C++ kernels can be called, and why (not)."""

    is_available: bool
    head_dim: int  # the only one they work for
    reason: str

    @property
    def paged_attention(self) -> str:
        """The target's name in XLA."""
        return f"{_PAGED_ATTENTION}_{self.head_dim}"


def load_native_kernels(directory: Path, *, head_dim: int) -> NativeKernels:
    """Compiles the kernels into `directory` unless they are there, and registers them with XLA."""
    if head_dim % _HEAD_DIM_STEP or head_dim > _MAX_HEAD_DIM:
        reason = f"head size {head_dim} is not a multiple of {_HEAD_DIM_STEP} up to {_MAX_HEAD_DIM}"
        return NativeKernels(is_available=False, head_dim=head_dim, reason=reason)
    try:
        library = ctypes.CDLL(str(_build(directory, head_dim)))
    except (OSError, _BuildError) as error:
        return NativeKernels(is_available=False, head_dim=head_dim, reason=str(error))
    for name, symbol in _SYMBOLS.items():
        capsule = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(f"{name}_{head_dim}", capsule, platform="cpu")
    reason = "C++ compiled for this processor"
    return NativeKernels(is_available=True, head_dim=head_dim, reason=reason)


class _BuildError(Exception):
    """There is no library; the text says why."""


def _build(directory: Path, head_dim: int) -> Path:
    """The library's path. Safe beside other processes that do the same: the last rename wins."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    flags = (*_FLAGS, f"-DJAXINFER_HEAD_DIM={head_dim}")
    key = hashlib.sha256("\0".join((*flags, jax.__version__, _processor())).encode())
    for source in _SOURCES:
        key.update(source.read_bytes())
    path = directory / f"kernels-{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    if compiler is None:
        raise _BuildError("no C++ compiler (c++, g++ or clang++) was found")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        output = Path(scratch) / path.name
        command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", *map(str, _SOURCES)]
        try:
            done = subprocess.run(
                [*command, "-o", str(output)],
                capture_output=True,
                text=True,
                timeout=_COMPILE_TIMEOUT_S,
                check=False,
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
