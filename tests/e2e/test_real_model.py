"""The default model, served by `jaxinfer serve` in a process of its own, asked by OpenAI's client.

One server for all tests, with few and small shapes; compiled programs are kept in the usual cache,
so a second run starts quickly. The last test ends the server.
"""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.api import CHAT, COMPLETIONS, READY_WITHIN_S, Api, serving, until

pytestmark = pytest.mark.model

NAME = "smollm2"
FLAGS = (
    *("--served-model-name", NAME, "--max-model-len", "1024", "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "128", "--token-buckets", "128"),
)
CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
COUNT = "1, 2, 3, 4, 5, 6, 7,"  # even a small model goes on with " 8, 9, ..."


@pytest.fixture(scope="module")
def api(smollm2_gguf: Path) -> Iterator[Api]:
    with serving(smollm2_gguf, *FLAGS, xla_flags="") as server:
        yield server


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return api.openai


def test_it_is_there(api: Api, client: openai.OpenAI):
    assert api.get("/health").status == 200
    assert api.get("/ready").status == 200
    assert [model.id for model in client.models.list()] == [NAME]


def test_the_capital_of_france(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model=NAME, messages=CAPITAL, temperature=0, max_completion_tokens=32
    )
    text = answer.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    streamed = client.chat.completions.create(
        model=NAME,
        messages=CAPITAL,
        temperature=0,
        max_completion_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    assert "".join(piece or "" for piece in pieces) == text
    assert sum(bool(piece) for piece in pieces) > 1, "it came in one piece"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens == answer.usage.total_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 32  # two whole pages of the same prompt


def test_a_conversation_goes_on(client: openai.OpenAI):
    messages = [
        *CAPITAL,
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "And of Italy?"},
    ]
    answer = client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_completion_tokens=32
    )
    assert "Rome" in (answer.choices[0].message.content or "")


def test_completions_with_logprobs(client: openai.OpenAI):
    answer = client.completions.create(
        model=NAME, prompt=COUNT, temperature=0, max_tokens=6, logprobs=3, echo=True
    )
    choice = answer.choices[0]
    assert choice.text.startswith(f"{COUNT} 8, 9")
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None  # nothing comes before the first token
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    for token, value, top in zip(
        logprobs.tokens[-6:],
        logprobs.token_logprobs[-6:],
        logprobs.top_logprobs[-6:],
        strict=True,
    ):
        assert value == max(top.values())  # greedy
        assert top[token] == value


def test_stop_strings(client: openai.OpenAI):
    answer = client.completions.create(
        model=NAME, prompt=COUNT, temperature=0, max_tokens=40, stop=[" 12", "never"]
    )
    choice = answer.choices[0]
    assert choice.text == " 8, 9, 10, 11,"
    assert choice.finish_reason == "stop"


def test_seeds_repeat_and_n_differs(client: openai.OpenAI):
    def ask(**settings: Any) -> list[str]:
        answer = client.completions.create(
            model=NAME, prompt="Once upon a time", temperature=1.0, max_tokens=16, **settings
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    first = ask(seed=3, n=2)
    assert len(set(first)) == 2
    assert ask(seed=3, n=2) == first
    assert ask(seed=4) == first[1:]  # the i-th of n has seed + i
    assert ask(seed=5) != first[1:]


def test_many_at_once_get_what_they_get_alone(api: Api):
    """More requests than fit in a step, of all kinds, over long prompts and short ones."""
    story = "The quick brown fox jumps over the lazy dog. " * 12
    bodies: list[tuple[str, dict[str, Any]]] = []
    for index in range(4):
        bodies += [
            (CHAT, {"messages": CAPITAL, "temperature": 0, "max_completion_tokens": 10 + index}),
            (COMPLETIONS, {"prompt": COUNT, "temperature": 0, "max_tokens": 4 + index}),
            (
                COMPLETIONS,
                {
                    "prompt": story[: 40 * (index + 1)],
                    "seed": index,
                    "temperature": 0.8,
                    "top_p": 0.9,
                    "frequency_penalty": 0.5,
                    "max_tokens": 12,
                    "n": 1 + index % 2,
                    "stream": index % 2 == 0,
                },
            ),
        ]
    together = api.together([(path, dict(body)) for path, body in bodies])
    for answer, (path, body) in zip(together, bodies, strict=True):
        [alone] = api.together([(path, dict(body))])
        assert [choice.text for choice in answer.choices] == [c.text for c in alone.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
        assert reasons == [choice.finish_reason for choice in alone.choices]


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI, api: Api):
    with client.completions.create(
        model=NAME, prompt=COUNT, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: api.complete(COUNT).text, range(8)))
    assert len(set(texts)) == 1
    assert sample(api, "num_requests_running") == 0
    assert sample(api, "request_success_total", 'finished_reason="abort"') == 1


def sample(api: Api, name: str, *labels: str) -> float:
    values = [
        value
        for key, value in api.metrics().items()
        if key.startswith(f"jaxinfer:{name}{{") and all(label in key for label in labels)
    ]
    assert values, f"{name} is not in /metrics"
    return sum(values)


def test_metrics_count_and_nothing_was_compiled(api: Api):
    before = sample(api, "request_success_total")
    tokens = sample(api, "generation_tokens_total")
    for _ in range(3):
        api.complete(COUNT, max_tokens=5)
    assert sample(api, "request_success_total") == before + 3
    assert sample(api, "generation_tokens_total") == tokens + 15
    assert sample(api, "prefix_cache_hits_total") > 0
    assert sample(api, "time_to_first_token_seconds_count") >= before - 1
    assert sample(api, "compiles_after_ready_total") == 0


def test_a_killed_core_comes_back(api: Api):
    expected, steps = api.complete(COUNT).text, sample(api, "engine_steps_total")
    [core] = psutil.Process(api.process.pid).children()
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": COUNT, "max_tokens": 900, "ignore_eos": True}
        cut_off = pool.submit(api.request, "POST", COMPLETIONS, body)
        until(lambda: sample(api, "num_requests_running") == 1)
        core.kill()
        response = cut_off.result(20)
    assert response.status == 503
    assert "by signal 9. It is being restarted." in response.json()["error"]["message"]
    until(lambda: api.get("/ready").status == 503)
    until(lambda: api.get("/ready").status == 200, timeout_s=READY_WITHIN_S)
    assert api.get("/health").status == 200
    assert api.complete(COUNT).text == expected
    assert sample(api, "engine_restarts_total") == 1
    assert sample(api, "engine_steps_total") > steps
    assert sample(api, "compiles_after_ready_total") == 0


def test_sigterm_ends_it_and_leaves_nothing_behind(api: Api):
    processes = psutil.Process(api.process.pid).children(recursive=True)
    assert processes, "the engine is a process of its own"
    api.process.send_signal(signal.SIGTERM)
    assert api.process.wait(20) == 0
    assert not [process for process in processes if process.is_running()]
    assert "Traceback" not in "".join(api.log)
