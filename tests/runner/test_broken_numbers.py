"""NaN weights: the requests that meet them fail, with a reason; no one else notices."""

import numpy as np
import pytest

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.runner.runner import BROKEN_LOGITS, Runner
from tests.runner.conftest import MakeRunner
from tests.runner.harness import Engine
from tests.runner.tiny_llama import TinyLlama

POISON = 7  # a token whose embedding is broken
PADDING = 0  # what fills up a step's tokens; broken as well


def greedy(max_tokens: int = 12, **values: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sick() -> TinyLlama:
    """Its embeddings of two tokens are NaN, and no other request can sample them."""
    model = TinyLlama(seed=5)
    model.weights["model.embed_tokens.weight"][[POISON, PADDING]] = np.nan
    return model


@pytest.fixture(scope="module")
def runner(
    make_runner: MakeRunner, sick: TinyLlama, tmp_path_factory: pytest.TempPathFactory
) -> Runner:
    return make_runner(sick.save(tmp_path_factory.mktemp("sick")))


NO_POISON = {"bad_words_token_ids": [[POISON], [PADDING]]}


def healthy(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 96, length).tolist()


def reference(model: TinyLlama, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits_V = model.logits(tokens)[-1]
        logits_V[[POISON, PADDING]] = -np.inf
        tokens.append(int(logits_V.argmax()))
    return tokens[len(prompt) :]


def test_only_the_poisoned_requests_fail(runner: Runner, sick: TinyLlama):
    """Poison at the start, in the middle and at the end of prompts, among healthy requests."""
    engine = Engine(runner)
    prompts = {f"good-{i}": healthy(i, 5 + 11 * i) for i in range(6)}
    for index, at in enumerate((0, 20, 39)):
        bad = healthy(100 + index, 40)
        bad[at] = POISON
        prompts[f"bad-{index}"] = bad
    for name in sorted(prompts, key=lambda name: name[-1]):
        engine.add(name, prompts[name], greedy(**NO_POISON))
        engine.step()
    engine.finish()
    for name, prompt in prompts.items():
        output = engine.outputs[name]
        if name.startswith("bad"):
            assert (output.finish_reason, output.error) == ("error", BROKEN_LOGITS)
            assert output.token_ids == []
        else:
            assert output.error is None
            assert output.token_ids == reference(sick, prompt, 12)


def test_poisoned_pages_are_not_shared_and_not_feared(runner: Runner, sick: TinyLlama):
    """The same beginning is computed anew, and pages that held NaN serve the next ones."""
    engine = Engine(runner)
    beginning = healthy(50, 24)
    assert engine.run([*beginning, POISON, *healthy(51, 20)], greedy()).error == BROKEN_LOGITS
    prompts = [beginning + healthy(52 + index, 30) for index in range(4)]
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, greedy(**NO_POISON))
    engine.finish()
    for index, prompt in enumerate(prompts):
        assert engine.outputs[str(index)].token_ids == reference(sick, prompt, 12)


def test_a_request_that_samples_poison_fails_from_there(runner: Runner, sick: TinyLlama):
    """What came before it stays right."""
    prompt = healthy(60, 9)
    neighbour = healthy(61, 9)
    engine = Engine(runner)
    steering = {"logit_bias": {POISON: 100.0}}
    engine.add("bad", prompt, greedy(8, **steering))
    engine.add("good", neighbour, greedy(8, **NO_POISON))
    engine.finish()
    assert engine.outputs["bad"].token_ids == [POISON]
    assert engine.outputs["bad"].error == BROKEN_LOGITS
    assert engine.outputs["good"].token_ids == reference(sick, neighbour, 8)


def test_prompt_logprobs_of_poison_fail_before_a_nan_goes_out(runner: Runner):
    bad = [*healthy(70, 40), POISON, *healthy(71, 40)]
    output = Engine(runner).run(bad, greedy(4, prompt_logprobs=1))
    assert output.error == BROKEN_LOGITS
    values = [value for entry in output.prompt_logprobs for value in entry.logprobs]
    assert np.isfinite(values).all()


def test_no_token_allowed_is_an_error_not_token_0(runner: Runner):
    words = [[token] for token in range(10, 20)]
    sampling = greedy(4, allowed_token_ids=list(range(10, 20)), bad_words_token_ids=words)
    output = Engine(runner).run(healthy(80, 4), sampling)
    assert (output.token_ids, output.error) == ([], BROKEN_LOGITS)
