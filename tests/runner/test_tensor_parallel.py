"""Two and four devices give the tokens of the reference, with sizes that do not divide."""

import numpy as np
import pytest

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.planner.hlo import collectives_of
from tests.runner.conftest import MakeRunner
from tests.runner.harness import Engine
from tests.runner.tiny_llama import TinyLlama


@pytest.fixture(scope="module")
def odd() -> TinyLlama:
    """Nine query and three KV heads, as SmolLM2; vocabulary and hidden width are odd."""
    return TinyLlama(
        seed=2, num_heads=9, num_kv_heads=3, model_dim=36, hidden_dim=51, vocab_size=97
    )


@pytest.mark.parametrize("tensor", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_devices_change_no_token(
    odd: TinyLlama, tensor: int, make_runner: MakeRunner, tmp_path_factory: pytest.TempPathFactory
):
    runner = make_runner(
        odd.save(tmp_path_factory.mktemp("odd")),
        tensor_parallel_size=tensor,
        max_num_seqs=4 // tensor,
        max_num_batched_tokens=16,
        token_buckets=[16],
    )
    assert runner.device_name.startswith(f"{tensor} x ")
    assert runner.vocab_size == 97
    engine = Engine(runner)
    prompts = {
        str(length): np.random.default_rng(length).integers(2, 97, length).tolist()
        for length in (1, 9, 40)
    }
    for name, prompt in prompts.items():
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1)
        engine.add(name, prompt, sampling)
    engine.finish()
    for name, prompt in prompts.items():
        output = engine.outputs[name]
        assert output.token_ids == odd.greedy(prompt, 12)
        log_probs_TV = odd.log_probs(prompt)
        for position, entry in enumerate(output.prompt_logprobs):
            expected_V = log_probs_TV[position]
            np.testing.assert_allclose(entry.logprobs, expected_V[entry.token_ids], atol=2e-4)
    assert runner.num_compiles_after_ready == 0
    for program in runner._programs.steps.values():
        # Two sums a layer and one for the embedding; logits are gathered in branches only.
        always = [item.kind for item in collectives_of(program.as_text()) if item.always]
        assert always == ["all-reduce"] * (2 * odd.num_layers + 1)
