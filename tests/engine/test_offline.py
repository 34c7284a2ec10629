"""LLM over the real scheduler and the fake device."""

import signal
from dataclasses import replace

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.config.schema import EngineConfig
from jaxinfer.engine.inproc import InProcessClient
from jaxinfer.errors import EngineDeadError, RequestError
from jaxinfer.tokenizer.tokenizer import Tokenizer
from tests.engine.fake_runner import EOS, MAGIC_NAN_TOKEN, expected_output

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_outputs_come_in_order_and_equal_each_request_alone(llm: LLM) -> None:
    prompts = [f"prompt number {index}" for index in range(40)]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    for output in outputs:
        (completion,) = output.outputs
        assert completion.token_ids == expected_output(output.prompt_token_ids, GREEDY, 12)
        assert completion.finish_reason == ("stop" if EOS in completion.token_ids else "length")
        assert completion.text == "".join(chr(t) for t in completion.token_ids if t != EOS)
        assert output.finished


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_preemptions_change_no_output(
    config: EngineConfig, tokenizer: Tokenizer, async_scheduling: bool
) -> None:
    config = replace(
        config,
        cache=replace(config.cache, num_gpu_blocks_override=10),
        scheduler=replace(config.scheduler, async_scheduling=async_scheduling),
    )
    client = InProcessClient(config, runner_factory="tests.engine.fake_runner:build_runner")
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM.from_parts(client, tokenizer) as llm:
        outputs = llm.generate([f"p{index}" for index in range(12)], params)
        assert llm.stats.num_preemptions_total > 0
    for output in outputs:
        expected = expected_output(output.prompt_token_ids, params, 40)
        assert output.outputs[0].token_ids == expected


def test_token_prompts_and_one_set_of_params_each(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": [1, 2, 3]}, [4, 5], "text"]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 2, 3)]
    outputs = llm.generate(prompts, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3]
    assert outputs[0].prompt is None
    assert outputs[1].prompt_token_ids == [4, 5]
    assert (
        llm.generate([4, 5], params[1])[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    )
    with pytest.raises(RequestError, match="got 2 for 3 prompts"):
        llm.generate(prompts, params[:2])


def test_seeds_make_runs_repeatable(llm: LLM) -> None:
    def texts(params: SamplingParams) -> list[str]:
        return [completion.text for completion in llm.generate("p", params)[0].outputs]

    seeded = SamplingParams(n=3, seed=5, max_tokens=8)
    first = texts(seeded)
    assert len(set(first)) == 3
    assert texts(seeded) == first
    # The i-th of n is the single one of seed + i.
    assert texts(SamplingParams(n=1, seed=6, max_tokens=8)) == first[1:2]
    unseeded = SamplingParams(n=3, max_tokens=8)
    assert len(set(texts(unseeded) + texts(unseeded))) == 6


def test_chat_renders_the_template(llm: LLM) -> None:
    (output,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    assert output.prompt == "u:hi;"
    two = llm.chat([[{"role": "user", "content": "hi"}], [{"role": "system", "content": "x"}]])
    assert [output.prompt for output in two] == ["u:hi;", "s:x;"]


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True
    )
    (output,) = llm.generate("abc", params)
    (completion,) = output.outputs
    token = completion.token_ids[0]
    assert completion.logprobs is not None
    assert [list(entry) for entry in completion.logprobs][0] == [token, token + 1]
    sampled, top = completion.logprobs[0].values()
    assert (sampled.logprob, sampled.rank, sampled.decoded_token) == (-1.0, 2, chr(token))
    assert (top.logprob, top.rank) == (-0.5, 1)
    assert completion.cumulative_logprob == -3.0
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    # The token that is there, then the most likely one.
    assert [list(entry) for entry in output.prompt_logprobs[1:] if entry] == [
        [ord("b"), ord("b") + 1],
        [ord("c"), ord("c") + 1],
    ]


def test_prompt_only(llm: LLM) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = llm.generate([list(range(64))], params)
    assert output.outputs[0].finish_reason == "length"
    assert output.outputs[0].token_ids == []
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 64


def test_a_broken_sequence_fails_alone(llm: LLM) -> None:
    bad, good = llm.generate([[MAGIC_NAN_TOKEN, 1], [1, 2]], GREEDY)
    assert bad.outputs[0].finish_reason == "error"
    assert good.outputs[0].token_ids == expected_output([1, 2], GREEDY, 12)


def test_a_bad_prompt_costs_no_work_and_the_next_call_works(llm: LLM) -> None:
    with pytest.raises(RequestError, match="maximum context length is 64 tokens"):
        llm.generate(["fine", "x" * 64], GREEDY)
    assert llm.stats.num_steps_total == 0
    assert llm.generate("fine", GREEDY)[0].finished


def test_ctrl_c_stops_between_steps_and_the_engine_lives(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = InProcessClient.step
    num_steps = 0

    def step_with_ctrl_c(client: InProcessClient) -> list:
        nonlocal num_steps
        if num_steps == 2:
            signal.raise_signal(signal.SIGINT)
        messages = step(client)
        num_steps += 1
        return messages

    monkeypatch.setattr(InProcessClient, "step", step_with_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"], SamplingParams(max_tokens=30, ignore_eos=True))
    assert num_steps >= 3, "the step in which it came was finished"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (output,) = llm.generate("a", GREEDY)
    assert output.outputs[0].token_ids == expected_output(output.prompt_token_ids, GREEDY, 12)
    assert llm.stats.num_running == llm.stats.num_waiting == 0


def test_a_device_that_breaks_ends_the_engine(config: EngineConfig, tokenizer: Tokenizer) -> None:
    client = InProcessClient(config, runner_factory="tests.engine.fake_runner:build_failing")
    llm = LLM.from_parts(client, tokenizer)
    with pytest.raises(EngineDeadError, match="the device is lost"):
        llm.generate("abc", SamplingParams(max_tokens=20, ignore_eos=True))
    with pytest.raises(EngineDeadError):
        llm.generate("abc", GREEDY)
