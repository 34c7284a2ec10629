"""A real runner that loses its arrays in a step: the core resets it and finds who was to blame."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import ScheduledStep
from jaxinfer.runner.runner import PendingStep, Runner
from tests.runner.harness import Engine, Mode

BAD = 11  # the step that computes a prompt which begins with it loses everything
SEEDED = SamplingParams(temperature=1.0, seed=5, max_tokens=14, ignore_eos=True, top_k=20)
PENALTY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, repetition_penalty=1.3)
PLAIN = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)


class Losing:
    """A Runner whose steps with a bad request fail as steps on a device do: their results cannot
    be read, and the arrays that they were given are gone."""

    def __init__(self, runner: Runner, place: str) -> None:
        self._runner = runner
        self._place = place
        self._is_bad: dict[int, bool] = {}  # by slot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def dispatch(self, step: ScheduledStep) -> PendingStep:
        pending = self._runner.dispatch(step)
        for seq in step.seqs:
            if seq.admission is not None:
                self._is_bad[seq.slot] = seq.admission.prompt_token_ids[0] == BAD
        if any(self._is_bad[seq.slot] for seq in step.seqs):
            for array in jax.tree.leaves((self._runner._pages_L, self._runner._state)):
                array.delete()
            pending._tokens_S.delete()
            if self._place == "dispatch":
                raise jax.errors.JaxRuntimeError("INTERNAL: the kernel failed")
        return pending


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(20, 96, length).tolist()


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("place", ["dispatch", "result"])
def test_the_others_get_their_tokens(runner: Runner, place: str, *, prefix_caching: bool) -> None:
    mode = Mode(prefix_caching=prefix_caching)
    alone = Engine(runner, mode)
    requests = {
        f"r{index}": (prompt(index, 3 + 12 * index), params)
        for index, params in enumerate((SEEDED, PENALTY, PLAIN, SEEDED, PENALTY))
    }
    expected = {name: alone.run(*request).token_ids for name, request in requests.items()}
    num_compiles = runner.num_compiles_after_ready

    engine = Engine(Losing(runner, place), mode)  # pyright: ignore[reportArgumentType]
    for name, request in requests.items():
        engine.add(name, *request)
        engine.step()
    engine.add("bad", [BAD, 30, 31], PLAIN)
    engine.finish()

    bad = engine.outputs["bad"]
    assert bad.finish_reason == "error"
    assert "broke twice" in (bad.error or "")
    assert {name: engine.outputs[name].token_ids for name in requests} == expected
    assert engine.stats.kv_usage == 0
    assert engine.stats.num_failed_steps_total > 1
    assert runner.num_compiles_after_ready == num_compiles, "a reset compiles nothing"
    after = Engine(runner, mode).run(*requests["r2"])
    assert after.token_ids == expected["r2"], "the runner is as before"
