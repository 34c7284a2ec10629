"""Keys, models, version, ids, metrics, the document of the interface."""

import logging
from typing import Any

import pytest

import jaxinfer
from tests.server.conftest import MODEL, Serve, Served
from tests.server.test_bad_input import GOOD, check_envelope

GUARDED = ["/v1/models", "/v1/models/tiny", "/metrics", "/version", "/ping", "/openapi.json"]


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "Basic one", "one", "Bearer one two", "Bearer \xff"],
)
async def test_every_route_but_the_probes_wants_a_key(serve: Serve, header: str | None) -> None:
    served = await serve(api_key=["one", "two"])
    headers = {} if header is None else {"Authorization": header}
    for path in [*GUARDED, "/no/such/route"]:
        async with served.http.get(served.url + path, headers=headers) as response:
            assert response.status == 401, path
            check_envelope(401, await response.json(), "AuthenticationError")
    for path, good in GOOD.items():
        for stream in (False, True):
            status, _ = await served.post(path, {**good, "stream": stream}, headers=headers)
            assert status == 401
    assert (await served.get("/health", headers=headers))[0] == 200
    assert (await served.get("/ready", headers=headers))[0] == 200
    assert not served.core.added


async def test_each_key_works(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXINFER_API_KEY", "three")
    served = await serve(api_key=["one", "two"])
    for key in ("one", "two", "three"):
        headers = {"Authorization": f"Bearer {key}"}
        for path in GUARDED:
            assert (await served.get(path, headers=headers))[0] == 200, path


async def test_models(serve: Serve) -> None:
    served = await serve(served_model_name=["org/first", "second"])
    models = await served.openai.models.list()
    assert [model.id for model in models.data] == ["org/first", "second"]
    one = await served.openai.models.retrieve("org/first")
    assert one.id == "org/first"
    assert one.owned_by == "jaxinfer"
    status, _ = await served.get("/v1/models/third")
    assert status == 404
    for name in ("second", "org/first"):
        status, answer = await served.post("/v1/completions", {"model": name, "prompt": "x"})
        assert (status, answer["model"]) == (200, name)
    status, answer = await served.post("/v1/completions", {"prompt": "x"})
    assert answer["model"] == "org/first"


async def test_version_ping_and_root_path(serve: Serve) -> None:
    served = await serve(root_path="/api/")
    for prefix in ("", "/api"):
        status, text = await served.get(f"{prefix}/version")
        assert (status, text) == (200, f'{{"version":"{jaxinfer.__version__}"}}')
        assert (await served.get(f"{prefix}/ping"))[0] == 200
        status, _ = await served.post(f"{prefix}/v1/completions", {"prompt": "x"})
        assert status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_request_ids(served: Served, *, stream: bool) -> None:
    url = f"{served.url}/v1/completions"
    body = {"prompt": "x", "stream": stream}
    for given, used in (("abc-1", "abc-1"), ("bad id\t", None), (None, None)):
        headers = {} if given is None else {"X-Request-Id": given}
        async with served.http.post(url, json=body, headers=headers) as response:
            request_id = response.headers["X-Request-Id"]
            text = await response.text()
        assert f'"id":"cmpl-{request_id}"' in text
        assert request_id == used or (used is None and len(request_id) == 32)


async def test_the_same_id_twice_at_once_is_two_requests(served: Served) -> None:
    import asyncio

    headers = {"X-Request-Id": "same"}
    answers = await asyncio.gather(
        *(
            served.post("/v1/completions", {"prompt": prompt, "echo": True}, headers=headers)
            for prompt in "abc"
        )
    )
    assert [answer["choices"][0]["text"][0] for _, answer in answers] == ["a", "b", "c"]


def _samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.mark.parametrize("prefix", ["jaxinfer", "vllm"])
async def test_metrics(serve: Serve, prefix: str) -> None:
    served = await serve(metrics_prefix=prefix)
    body: dict[str, Any] = {"prompt": "hello", "max_tokens": 4, "n": 2}
    await served.post("/v1/completions", body)
    await served.post("/v1/completions", {**body, "stream": True})
    await served.post("/v1/completions", {**body, "temperature": 9})
    await served.post("/secret/../unknown/route", body)
    status, text = await served.get("/metrics")
    assert status == 200
    samples = _samples(text)
    label = 'model_name="tiny"'

    def value(name: str, extra: str = "") -> float:
        return samples[f"{prefix}:{name}{{{extra}{label}}}"]

    assert value("prompt_tokens_total") == 10
    assert value("generation_tokens_total") == 16
    assert value("request_success_total", 'finished_reason="length",') == 4
    assert value("request_success_total", 'finished_reason="abort",') == 0
    assert value("num_requests_running") == 0
    assert value("num_requests_waiting") == 0
    assert value("kv_cache_usage_perc") == 0
    assert value("time_to_first_token_seconds_count") == 4
    assert value("inter_token_latency_seconds_count") == 12
    assert value("e2e_request_latency_seconds_count") == 2
    assert value("request_queue_time_seconds_count") == 2
    assert value("prefix_cache_queries_total") == 0
    assert value("prefix_cache_hits_total") == 0
    assert value("num_preemptions_total") == 0
    assert value("engine_steps_total") > 0
    assert value("iteration_tokens_total_sum") == 16
    assert 0 < value("iteration_tokens_total_count") <= value("engine_steps_total")
    http = {name: count for name, count in samples.items() if name.startswith("http_requests_t")}
    assert http == {
        'http_requests_total{handler="/v1/completions",method="POST",status="200"}': 2,
        'http_requests_total{handler="/v1/completions",method="POST",status="400"}': 1,
        'http_requests_total{handler="none",method="POST",status="404"}': 1,
    }
    assert "secret" not in text


async def test_openapi_names_every_route_and_field(served: Served) -> None:
    import json

    status, text = await served.get("/openapi.json")
    assert status == 200
    document = json.loads(text)
    assert document["openapi"].startswith("3.1")
    for path, methods in document["paths"].items():
        for method in methods:
            url = served.url + path.replace("{id}", MODEL)
            async with served.http.request(method, url, json={}) as response:
                assert response.status in (200, 400), path
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "top_k", "seed"} <= set(fields)


async def test_one_log_line_a_request(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="jaxinfer")
    served = await serve()
    await served.post("/v1/completions", {"prompt": "x", "max_tokens": 3})
    await served.post("/v1/completions", {"prompt": "", "max_tokens": 3})
    await served.get("/health")
    lines = [record.getMessage() for record in caplog.records if "/" in record.getMessage()]
    assert len(lines) == 2
    assert "POST /v1/completions 200" in lines[0]
    assert "prompt=1 cached=3 output=3" in lines[0]
    assert "finish=length" in lines[0]
    assert "POST /v1/completions 400" in lines[1]
    caplog.clear()
    quiet = await serve(disable_log_requests=True)
    await quiet.post("/v1/completions", {"prompt": "x"})
    assert not caplog.records
