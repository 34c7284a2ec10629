"""After ready nothing is traced, lowered or compiled, whatever is asked. A compile is a fault."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import msgspec
import pytest

from jaxinfer import LLM, SamplingParams
from tests.runner.workload import random_cases

_COMPILE_EVENTS = "/jax/core/compile/"  # tracing and lowering too: they cost host time as well


class CompileWatch:
    """Every event of JAX's compiler in this process, from the time it is asked to watch."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.is_watching = False
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if self.is_watching and event.startswith(_COMPILE_EVENTS):
            with self._lock:
                self.events.append(event)


@pytest.fixture(scope="module")
def llm(tiny_dir: Path, engine_args: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_dir), **engine_args) as llm:
        yield llm


@pytest.fixture(scope="module")
def watch() -> CompileWatch:
    return CompileWatch()


def test_the_watch_sees_a_compilation(watch: CompileWatch):
    watch.is_watching = True
    jax.jit(lambda x: x * 5)(jax.device_put(1.5))
    watch.is_watching = False
    assert {event.removeprefix(_COMPILE_EVENTS) for event in watch.events} >= {
        "jaxpr_trace_duration",
        "backend_compile_duration",
    }
    watch.events.clear()


def test_200_mixed_requests_compile_nothing(llm: LLM, watch: CompileWatch):
    """Prompts of 1 token to the whole context, all sampling features, n > 1, text and ids."""
    info = llm.info
    cases = random_cases(
        200,
        seed=11,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        max_output=12,
    )
    prompts: list[Any] = [{"prompt_token_ids": case.prompt} for case in cases]
    params = [case.sampling for case in cases]
    prompts += [{"prompt_token_ids": [5] * length} for length in range(1, info.max_model_len)]
    params += [SamplingParams(max_tokens=1, temperature=0)] * (info.max_model_len - 1)
    prompts += ["Hello world", {"prompt_token_ids": [7] * info.max_model_len}]
    params += [
        SamplingParams(n=3, stop=["q"], logprobs=20, prompt_logprobs=20, bad_words=["a", "bc"]),
        SamplingParams(max_tokens=0, prompt_logprobs=1),
    ]
    watch.is_watching = True
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.reset_prefix_cache()
    again = llm.generate(prompts[:20], params[:20], use_tqdm=False)
    watch.is_watching = False
    assert watch.events == []
    assert llm.stats.num_compiles_after_ready == 0
    assert len(outputs) == len(prompts)
    assert all(output.finished for output in outputs)
    assert all(out.finish_reason in ("stop", "length") for o in outputs for out in o.outputs)
    for first, second in zip(outputs[:20], again, strict=True):
        assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_one_by_one_as_well(llm: LLM, watch: CompileWatch):
    """Alone, a request meets the smallest shapes."""
    watch.is_watching = True
    for length in (1, 2, 33):
        for sampling in (
            SamplingParams(temperature=0, max_tokens=3),
            SamplingParams(temperature=1.2, top_p=0.8, top_k=5, max_tokens=3, logprobs=3),
            SamplingParams(prompt_logprobs=0, max_tokens=1, logit_bias={3: 4.0}),
        ):
            llm.generate([list(range(2, 2 + length))], sampling, use_tqdm=False)
    watch.is_watching = False
    assert watch.events == []
    assert llm.stats.num_compiles_after_ready == 0


def test_n_completions_are_those_of_their_seeds(llm: LLM):
    prompt = [[5, 6, 7]]
    params = SamplingParams(n=4, seed=40, temperature=1.0, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    tokens = [tuple(completion.token_ids) for completion in output.outputs]
    assert len(set(tokens)) == 4
    for index in range(4):
        alone = msgspec.structs.replace(params, n=1, seed=40 + index)
        (single,) = llm.generate(prompt, alone, use_tqdm=False)
        assert tuple(single.outputs[0].token_ids) == tokens[index]
