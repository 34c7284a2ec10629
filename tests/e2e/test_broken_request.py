"""One token's weights are NaN: over HTTP, only the requests that meet it fail."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.api import COMPLETIONS, Api, Response, serving
from tests.e2e.conftest import SMALL_FLAGS
from tests.e2e.tiny_model import write_tiny_model

POISON = 200  # a token id; no healthy request may sample it
HEALTHY = [[20 + 3 * n + k for k in range(5 + 9 * n)] for n in range(6)]
SETTINGS: dict[str, Any] = {
    "max_tokens": 20,
    "temperature": 0,
    "ignore_eos": True,
    "logit_bias": {str(POISON): -100},
    "return_token_ids": True,
}


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    model: Path = write_tiny_model(tmp_path_factory.mktemp("sick") / "tiny")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = np.nan
    save_file(weights, model / "model.safetensors")
    with serving(model, *SMALL_FLAGS) as server:
        yield server


def poisoned(healthy: list[int], at: int) -> list[int]:
    return [*healthy[:at], POISON, *healthy[at:]]


def metric(api: Api, name: str) -> float:
    return sum(v for key, v in api.metrics().items() if key.startswith(f"jaxinfer:{name}{{"))


def test_neighbours_in_the_batch_do_not_notice(sick: Api) -> None:
    expected = [sick.complete(prompt, **SETTINGS).token_ids for prompt in HEALTHY]
    sick_prompts = [poisoned(HEALTHY[5], 0), poisoned(HEALTHY[4], 39), poisoned(HEALTHY[3], 20)]

    def fail(prompt: list[int]) -> list[Response]:
        body = {**SETTINGS, "prompt": prompt}
        both = (body, {**body, "stream": True})
        return [sick.request("POST", COMPLETIONS, body) for body in both]

    for _ in range(2):
        with ThreadPoolExecutor(9) as pool:
            failures = [pool.submit(fail, prompt) for prompt in sick_prompts]
            answers = [pool.submit(sick.complete, prompt, **SETTINGS) for prompt in HEALTHY]
        assert [answer.result().token_ids for answer in answers] == expected
        for response in (one for failure in failures for one in failure.result()):
            assert response.status == 500, response.text
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("InternalServerError", 500)
            assert "no finite logits" in error["message"]
    assert metric(sick, "kv_cache_usage_perc") == 0
    assert metric(sick, "failed_steps_total") == metric(sick, "engine_restarts_total") == 0


def test_pages_of_a_broken_request_are_not_found_again(sick: Api) -> None:
    prefix = [30 + k for k in range(48)]  # three whole pages
    body = {**SETTINGS, "prompt": [*prefix, POISON]}
    for _ in range(2):
        hits = metric(sick, "prefix_cache_hits_total")
        assert sick.request("POST", COMPLETIONS, body).status == 500
        assert metric(sick, "prefix_cache_hits_total") == hits
    answer = sick.whole(COMPLETIONS, **SETTINGS, prompt=prefix)
    assert answer.usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert sick.complete(prefix, **SETTINGS).token_ids == answer.only.token_ids
