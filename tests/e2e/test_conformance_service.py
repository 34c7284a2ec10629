"""What surrounds generation: models, probes, headers, metrics, many clients, clients that leave."""

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.api import CHAT, COMPLETIONS, Api, exchange, serving, until
from tests.e2e.conftest import SMALL_FLAGS

KEY = "sk-test"
LONG = {"prompt": "Once", "max_tokens": 250, "ignore_eos": True}


@pytest.fixture(scope="module")
def guarded(tiny_model: Path) -> Iterator[Api]:
    """A server with a key, vLLM's metric names, priorities and a path prefix."""
    flags = ("--api-key", KEY, "--metrics-prefix", "vllm", "--root-path", "/base")
    policy = ("--scheduling-policy", "priority", "--served-model-name", "org/tiny")
    with serving(tiny_model, *SMALL_FLAGS, *flags, *policy, key=KEY) as server:
        yield server


def test_models(api: Api) -> None:
    listed = api.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny", "alias"]
    for card in listed["data"]:
        assert card["object"] == "model"
        assert card["max_model_len"] == 256
        assert api.get(f"/v1/models/{card['id']}").json() == card
    assert [model.id for model in api.openai.models.list()] == ["tiny", "alias"]
    assert api.openai.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        api.openai.models.retrieve("other")


def test_names_of_the_model(api: Api) -> None:
    for name in ("tiny", "alias"):
        answer = api.post(COMPLETIONS, {"model": name, "prompt": "x", "max_tokens": 1})
        assert answer["model"] == name
    assert api.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1})["model"] == "tiny"
    error = api.post(COMPLETIONS, {"model": "other", "prompt": "x"}, status=404)["error"]
    assert (error["param"], error["code"]) == ("model", 404)


def test_probes(api: Api) -> None:
    assert api.get("/health").status == 200
    assert api.get("/ready").status == 200
    assert re.fullmatch(r"\d+\.\d+.*", api.get("/version").json()["version"])
    head = api.request("HEAD", "/health")
    assert (head.status, head.text) == (200, "")
    refused = api.request("OPTIONS", COMPLETIONS)
    assert (refused.status, refused.headers["allow"]) == (405, "POST")
    assert refused.json()["error"]["code"] == 405


def test_openapi(api: Api) -> None:
    document = api.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert {COMPLETIONS, CHAT, "/v1/models", "/tokenize", "/metrics"} <= set(document["paths"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["responses"]
            names = [parameter["name"] for parameter in operation.get("parameters", [])]
            assert names == re.findall(r"{(\w+)}", path)
    schemas = document["components"]["schemas"]
    for name in re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document)):
        assert name in schemas
    assert "max_tokens" in schemas["CompletionRequest"]["properties"]


def test_request_ids(api: Api) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    response = api.request("POST", COMPLETIONS, body, headers={"X-Request-Id": "abc-123"})
    assert response.headers["x-request-id"] == "abc-123"
    assert response.json()["id"] == "cmpl-abc-123"
    first, second = (api.request("POST", COMPLETIONS, body) for _ in range(2))
    assert first.json()["id"] == f"cmpl-{first.headers['x-request-id']}"
    assert first.json()["id"] != second.json()["id"]
    assert api.get("/nowhere").headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_fields_without_effect_are_named(api: Api, *, stream: bool) -> None:
    body = {"prompt": "x", "max_tokens": 1, "stream": stream, "banana": 1, "user": "me"}
    response = api.request("POST", COMPLETIONS, body)
    assert response.status == 200
    assert response.headers["x-jaxinfer-ignored"] == "banana"
    del body["banana"]
    assert "x-jaxinfer-ignored" not in api.request("POST", COMPLETIONS, body).headers


def test_one_connection_for_many_requests(api: Api) -> None:
    """Answers, errors and streams leave the connection usable."""
    good: dict[str, Any] = {"prompt": "x", "max_tokens": 3}
    with closing(api.connect()) as connection:
        exchange(connection, "GET", "/health")
        socket = connection.sock
        for body, status in (
            (good, 200),
            ({**good, "stream": True}, 200),
            ({**good, "temperature": -1}, 400),
            ({**good, "model": "other"}, 404),
            (good, 200),
        ):
            assert exchange(connection, "POST", COMPLETIONS, body).status == status
        assert exchange(connection, "GET", "/nowhere").status == 404
        assert connection.sock is socket


# Keys, prefix, priorities.


def test_keys(guarded: Api, api: Api) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        for method, path in (
            ("POST", COMPLETIONS),
            ("GET", "/v1/models"),
            ("POST", "/tokenize"),
            ("GET", "/metrics"),
            ("GET", "/nowhere"),
        ):
            refused = guarded.request(method, path, body, headers=headers)
            assert refused.status == 401
            assert refused.json()["error"]["code"] == 401
            assert KEY not in refused.text
        assert guarded.request("GET", "/health", headers=headers).status == 200
        assert guarded.request("GET", "/ready", headers=headers).status == 200
    assert guarded.post(COMPLETIONS, body)["usage"]["completion_tokens"] == 1
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="no", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    # Without keys on the server any key will do.
    assert api.openai.models.list().data


def test_a_path_prefix_and_a_slash_in_the_name(guarded: Api) -> None:
    assert guarded.get("/base/v1/models").status == 200
    assert guarded.post("/base/v1/completions", {"prompt": "x"})["model"] == "org/tiny"
    assert guarded.openai.models.retrieve("org/tiny").id == "org/tiny"


def test_priorities(guarded: Api, api: Api) -> None:
    """A request that came last, but matters more, overtakes those that wait."""
    ended: list[str] = []

    def run(name: str, priority: int) -> None:
        guarded.post(COMPLETIONS, {**LONG, "priority": priority})
        ended.append(name)

    with ThreadPoolExecutor(40) as pool:
        for _ in range(32):
            pool.submit(run, "low", 5)
        until(lambda: guarded.metrics()['vllm:num_requests_waiting{model_name="org/tiny"}'] > 16)
        pool.submit(run, "high", -1)
    assert len(ended) == 33
    assert ended.index("high") < 24
    error = api.post(COMPLETIONS, {**LONG, "priority": 1}, status=400)["error"]
    assert error["param"] == "priority"
    assert "--scheduling-policy" in error["message"]


# Metrics.

_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_COUNTERS = (
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "request_success",
)
_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
)


@pytest.mark.parametrize("prefix", ["jaxinfer", "vllm"])
def test_names_and_types_of_metrics(request: pytest.FixtureRequest, prefix: str) -> None:
    server: Api = request.getfixturevalue("api" if prefix == "jaxinfer" else "guarded")
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", response.text, re.MULTILINE))
    for names, kind, suffix in (
        (_GAUGES, "gauge", ""),
        (_COUNTERS, "counter", "_total"),
        (_HISTOGRAMS, "histogram", ""),
    ):
        for name in names:
            assert kinds[f"{prefix}:{name}{suffix}"] == kind
    lines = [line for line in response.text.splitlines() if line.startswith(f"{prefix}:")]
    assert lines
    assert all('model_name="' in line for line in lines)


def change(before: dict[str, float], after: dict[str, float], name: str, labels: str = "") -> float:
    key = f'jaxinfer:{name}{{{labels}model_name="tiny"}}'
    return after[key] - before[key]


def test_counts(api: Api) -> None:
    before = api.metrics()
    prompt = [(13 * i) % 300 for i in range(64)]
    for index in range(3):
        body = {"prompt": prompt, "max_tokens": 10, "ignore_eos": True, "seed": index}
        api.post(COMPLETIONS, body)
    api.stream(COMPLETIONS, prompt="x", max_tokens=5, logit_bias={"342": 100})
    api.post(COMPLETIONS, {"prompt": "x", "max_tokens": 9999}, status=400)
    after = api.metrics()
    assert change(before, after, "prompt_tokens_total") == 3 * 64 + 1
    assert change(before, after, "generation_tokens_total") == 31
    assert change(before, after, "prefix_cache_queries_total") == 3 * 64
    assert change(before, after, "prefix_cache_hits_total") == 2 * 48
    assert change(before, after, "prompt_tokens_cached_total") == 2 * 48
    for reason, count in (("length", 3), ("stop", 1), ("abort", 0), ("error", 0)):
        labels = f'finished_reason="{reason}",'
        assert change(before, after, "request_success_total", labels) == count
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert change(before, after, f"{name}_count") == 4
        assert 0 < change(before, after, f"{name}_sum") < 30
    assert change(before, after, "inter_token_latency_seconds_count") == 27
    assert change(before, after, "request_queue_time_seconds_count") == 4
    assert change(before, after, "request_generation_tokens_sum") == 31
    assert change(before, after, "request_params_max_tokens_sum") == 35
    routes = 'http_requests_total{handler="/v1/completions",method="POST",status="200"}'
    assert after[routes] - before[routes] == 4


# Many at once, and gone.


def test_sixty_four_at_once(api: Api) -> None:
    before = api.metrics()
    features: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"n": 2},
        {"logprobs": 3},
        {"stop": ["zzz"]},
        {"top_k": 5, "repetition_penalty": 1.2},
        {"min_tokens": 4},
        {"prompt": list(range(100)), "cache_salt": "64"},
    ]
    bodies = [
        (
            COMPLETIONS,
            {
                "prompt": f"Fox {i}",
                "max_tokens": 4 + i % 20,
                "ignore_eos": True,
                "seed": i,
                "stream": i % 2 == 1,
                "stream_options": {"include_usage": True} if i % 2 else None,
                **features[i // 2 % len(features)],
            },
        )
        for i in range(64)
    ]
    expected = [body["max_tokens"] * body.get("n", 1) for _, body in bodies]
    answers = api.together(bodies)
    assert [answer.usage["completion_tokens"] for answer in answers] == expected
    after = api.metrics()
    assert change(before, after, "generation_tokens_total") == sum(expected)
    assert after['jaxinfer:compiles_after_ready_total{model_name="tiny"}'] == 0
    assert after['jaxinfer:num_requests_running{model_name="tiny"}'] == 0
    assert after['jaxinfer:kv_cache_usage_perc{model_name="tiny"}'] == 0


def test_greedy_under_load(api: Api) -> None:
    alone = api.complete("The lazy dog", max_tokens=40)
    stop = threading.Event()

    def load(index: int) -> None:
        while not stop.is_set():
            body = {"prompt": [index] * (5 + 20 * index), "max_tokens": 7 + index}
            api.post(COMPLETIONS, body)

    with ThreadPoolExecutor(8) as pool:
        for index in range(5):
            pool.submit(load, index)
        try:
            busy = [api.complete("The lazy dog", max_tokens=40) for _ in range(6)]
        finally:
            stop.set()
    assert all(choice == alone for choice in busy)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_client_that_leaves(api: Api, path: str, *, stream: bool) -> None:
    """Its pages are free within a second, and it is counted."""
    before = api.metrics()
    usage = 'jaxinfer:kv_cache_usage_perc{model_name="tiny"}'
    running = 'jaxinfer:num_requests_running{model_name="tiny"}'
    start = {"prompt": "x"} if path == COMPLETIONS else {"messages": [USER]}
    body = {**start, "max_tokens": 200, "n": 8, "ignore_eos": True, "stream": stream}
    with closing(api.connect()) as connection:
        data = json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        if stream:
            connection.getresponse().read1(10)
        else:
            until(lambda: api.metrics()[running] == 8)
    until(lambda: api.metrics()[running] == 0, timeout_s=1.0)
    after = api.metrics()
    assert after[usage] == 0
    aborted = change(before, after, "request_success_total", 'finished_reason="abort",')
    assert aborted == 8
    # They were cut short: nobody computed the rest.
    time.sleep(0.05)
    assert (
        api.metrics()['jaxinfer:engine_steps_total{model_name="tiny"}']
        == (after['jaxinfer:engine_steps_total{model_name="tiny"}'])
    )


USER = {"role": "user", "content": "Hi"}
