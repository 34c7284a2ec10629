"""Every program runs once before the engine is ready, and nothing of that is left behind."""

import jax
import numpy as np

from jaxinfer.runner.runner import Runner
from jaxinfer.runner.warm_up import warm_up


def _as_host(tree: object) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_the_state_is_that_of_an_engine_that_never_ran(runner: Runner):
    """Built, and so warmed up, against newly allocated."""
    runner.reset()
    fresh = _as_host(runner._state)
    calls = []
    memory = warm_up(
        runner._programs,
        runner._weights,
        runner._allocate(),
        runner.limits,
        vocab_size=runner.vocab_size,
        on_program=lambda name, done, total: calls.append((name, done, total)),
    )
    for before, after in zip(fresh, _as_host(memory.state), strict=True):
        np.testing.assert_array_equal(before, after)
    total = len(runner.buckets) + 1
    assert [call[1:] for call in calls] == [(done, total) for done in range(total + 1)]
    assert [name for name, _, _ in calls[: total - 1]] == [str(b) for b in runner.buckets]
