"""What a processor must have for a C++ library that was compiled elsewhere.

A library for "this processor" serves no other one. To ship libraries, in a container image say,
they are compiled for a few levels instead, and each machine takes the best that it can run. The
levels of x86-64 are those of its psABI (x86-64-v3: AVX2 and FMA; v4: AVX-512), and v4 with products
of bfloat16 pairs, for which matmul.cc has code of its own. Knows no kernels and no compiler.
"""

import platform
from pathlib import Path
from typing import NamedTuple


class Level(NamedTuple):
    """Processors that a library is compiled for."""

    name: str
    flags: tuple[str, ...]  # of the compiler
    needs: frozenset[str]  # what the kernel calls it in /proc/cpuinfo

    def runs_on(self, features: frozenset[str]) -> bool:
        return self.needs <= features


_V3 = frozenset("avx avx2 bmi1 bmi2 f16c fma movbe abm".split())
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
_LEVELS = {
    "x86_64": (
        Level(
            "x86-64-v4 with bfloat16",
            ("-march=x86-64-v4", "-mavx512bf16"),
            _V4 | {"avx512_bf16"},
        ),
        Level("x86-64-v4", ("-march=x86-64-v4",), _V4),
        Level("x86-64-v3", ("-march=x86-64-v3",), _V3),
    ),
    "aarch64": (Level("armv8-a", ("-march=armv8-a",), frozenset()),),
}


def levels_of(machine: str | None = None) -> tuple[Level, ...]:
    """The levels of a machine's architecture, the best first; none if it is not known."""
    return _LEVELS.get(machine or platform.machine(), ())


def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the processor has, as Linux names it; nothing where that cannot be read."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    values = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(values, "").split())
