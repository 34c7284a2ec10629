"""Compiling with little effort: LLVM's optimizations change speed, not results, and cost most."""

from collections.abc import Callable
from typing import Any

import jax


def quick_jit(
    function: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Wrapped:
    """`jax.jit` for tests on the CPU, where compiling takes longer than running."""
    return jax.jit(
        function,
        donate_argnums=donate_argnums,
        compiler_options={"xla_backend_optimization_level": 0},
    )
