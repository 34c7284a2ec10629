"""Times functions on the device: a loop inside one program, the fastest of several runs."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.stages import Compiled

_TARGET_S = 0.03  # of one run: long beside the clock and the launch
_LAUNCH_S = 2e-5
_LEAST_CALLS, _MOST_CALLS = 4, 200
_NUM_RUNS = 4


class Work(NamedTuple):
    """A function to time: `step(carry, prepared) -> carry`, with `prepared = prepare(*constants)`.

    `prepare` is run once and not timed. `carry` and `constants` are pytrees of arrays or shapes.
    """

    step: Callable[[Any, Any], Any]
    prepare: Callable[..., Any]
    carry: Any
    constants: tuple[Any, ...]


class Loop(NamedTuple):
    """A program of `num_calls` calls, each fed by the one before."""

    compiled: Compiled
    num_calls: int

    def seconds(self, carry: Any, constants: tuple[Any, ...]) -> float:
        """Of one call: the fastest of several runs. `carry` is used up."""
        best_s = float("inf")
        for _ in range(1 + _NUM_RUNS):  # the first also loads the program
            jax.block_until_ready((carry, constants))
            start_s = time.perf_counter()
            carry = jax.block_until_ready(self.compiled(carry, *constants))
            best_s = min(best_s, time.perf_counter() - start_s)
        return best_s / self.num_calls


def compile_loop(work: Work, *, expected_s: float) -> Loop:
    """Compiles for the shapes of `work`; `expected_s` is a guess at one call's time.

    The number of calls is fixed in the program: a loop with another kind of end would ask the host
    after each call.
    """
    num_calls = round(_TARGET_S / (expected_s + _LAUNCH_S))
    num_calls = max(_LEAST_CALLS, min(_MOST_CALLS, num_calls))

    def run(carry: Any, *constants: Any) -> Any:
        prepared = work.prepare(*constants)
        return lax.fori_loop(0, num_calls, lambda _, carry: work.step(carry, prepared), carry)

    compiled = jax.jit(run, donate_argnums=(0,)).lower(work.carry, *work.constants).compile()
    return Loop(compiled, num_calls)
