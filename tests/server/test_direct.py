"""Routes without HTTP: the answers and errors of the server, for the lines of a batch."""

import asyncio
from typing import Any

import pytest

from jaxinfer.batch.lines import Line, Reply
from jaxinfer.errors import ConfigError
from jaxinfer.server.direct import CHAT_URL, COMPLETION_URL, DirectApi, check_defaults
from tests.server.conftest import MODEL, Serve, Served

BOTH = (CHAT_URL, COMPLETION_URL)


async def ask(served: Served, url: str, body: dict[str, Any], **defaults: Any) -> Reply:
    api = DirectApi(served.state, defaults=defaults)
    return await api.answer(Line(1, "f:1", "a", url, body, 100))


def without_ids(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created")}


BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETION_URL, {"model": MODEL, "prompt": ["ab", "c"], "max_tokens": 3, "n": 2, "seed": 5}),
    (COMPLETION_URL, {"prompt": [97, 98], "logprobs": 2, "echo": True}),
    (CHAT_URL, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
    (CHAT_URL, {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "odd": 1}),
    (COMPLETION_URL, {"prompt": "x", "temperature": "warm"}),
    (COMPLETION_URL, {"prompt": "x", "model": "other"}),
    (COMPLETION_URL, {"prompt": "x" * 1000}),
    (COMPLETION_URL, {"prompt": "x", "suffix": "y"}),
    (COMPLETION_URL, {"prompt": ["x"] * 1024, "n": 5}),
    (COMPLETION_URL, {}),
    (CHAT_URL, {"messages": "hi"}),
]


@pytest.mark.parametrize(("url", "body"), BODIES)
async def test_the_same_as_over_http(url: str, body: dict[str, Any], served: Served):
    body = {"temperature": 0, **body}
    status, expected = await served.post(url, body)
    reply = await ask(served, url, body)
    assert reply.status == status
    assert without_ids(reply.body) == without_ids(expected)
    assert reply.retry_after_s is None
    if status == 200:
        assert reply.body["id"].endswith(reply.request_id)


async def test_what_only_a_batch_refuses(served: Served):
    reply = await ask(served, "/v1/embeddings", {"input": "x"})
    assert reply.status == 404
    assert "/v1/embeddings" in reply.body["error"]["message"]
    assert COMPLETION_URL in reply.body["error"]["message"]
    reply = await ask(served, COMPLETION_URL, {"prompt": "x", "stream": True})
    assert (reply.status, reply.body["error"]["param"]) == (400, "stream")
    await served.still_works()


async def test_what_is_of_the_moment_asks_to_come_back(served: Served):
    served.core.rejects_as = "queue_full"
    reply = await ask(served, COMPLETION_URL, {"prompt": "x"})
    assert (reply.status, reply.retry_after_s) == (429, 1.0)
    served.core.rejects_as = None
    served.core.die()
    await served.engine.wait_dead()
    reply = await ask(served, COMPLETION_URL, {"prompt": "x"})
    assert reply.status == 503
    assert reply.retry_after_s is not None
    assert not reply.lost_engine, "it was not asked"


async def test_a_line_in_work_tells_of_the_loss_of_the_engine(served: Served):
    served.core.is_frozen = True
    task = asyncio.create_task(ask(served, COMPLETION_URL, {"prompt": "x"}))
    while not served.core.open:  # noqa: ASYNC110 - the double has no event
        await asyncio.sleep(0.001)
    served.core.die()
    reply = await task
    assert (reply.status, reply.lost_engine) == (503, True)
    assert reply.retry_after_s is not None


async def test_a_broken_answer_is_the_lines_own(served: Served):
    served.core.breaks_after = 1
    reply = await ask(served, COMPLETION_URL, {"prompt": "x"})
    assert (reply.status, reply.retry_after_s) == (500, None)


async def test_a_line_that_is_given_up_is_aborted(served: Served):
    served.core.is_frozen = True
    task = asyncio.create_task(ask(served, COMPLETION_URL, {"prompt": "x"}))
    while not served.core.open:  # noqa: ASYNC110 - the double has no event
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(served.core.aborted) == 1


async def test_defaults_are_for_fields_that_a_line_leaves_out(serve: Serve):
    served = await serve(defaults={})

    async def last(url: str, body: dict[str, Any], **defaults: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", **body}
        reply = await ask(served, url, body, **defaults)
        assert reply.status == 200, reply.body
        return served.core.added[-1].sampling

    assert (await last(COMPLETION_URL, {}, max_tokens=3)).max_tokens == 3
    assert (await last(COMPLETION_URL, {"max_tokens": 4}, max_tokens=3)).max_tokens == 4
    assert (await last(COMPLETION_URL, {"max_tokens": None}, max_tokens=3)).max_tokens == 3
    assert (await last(CHAT_URL, {"max_tokens": 4}, max_completion_tokens=3)).max_tokens == 4
    assert (await last(CHAT_URL, {"max_completion_tokens": 4}, max_tokens=3)).max_tokens == 4
    assert (await last(COMPLETION_URL, {"temperature": 0}, temperature=1)).temperature == 0
    assert (await last(CHAT_URL, {}, temperature=0.5)).temperature == 0.5
    # one that a route does not know is not for it
    assert (await last(COMPLETION_URL, {}, max_tokens=2, top_logprobs=1)).logprobs is None


@pytest.mark.parametrize(
    ("defaults", "urls", "words"),
    [
        ({"temprature": 1}, BOTH, ["unknown name 'temprature'", "Did you mean temperature?"]),
        ({"temperature": 9}, BOTH, ["temperature", "9"]),
        ({"top_k": "x"}, BOTH, ["top_k must be an integer"]),
        ({"messages": []}, BOTH, ["messages belongs into the lines"]),
        ({"stream": True}, BOTH, ["stream belongs into the lines"]),
        ({"logprobs": 3}, BOTH, ["logprobs must be true or false", CHAT_URL]),
        ({"top_logprobs": 3}, (COMPLETION_URL,), ["unknown name 'top_logprobs'"]),
        ({"best_of": 3}, BOTH, ["best_of"]),
        ({"max_tokens": 0}, (COMPLETION_URL,), ["max_tokens must be at least 1"]),
    ],
)
def test_wrong_defaults(defaults: dict[str, Any], urls: tuple[str, ...], words: list[str]):
    with pytest.raises(ConfigError) as caught:
        check_defaults(defaults, urls)
    for word in ["sampling: ", *words]:
        assert word in str(caught.value)


def test_good_defaults():
    check_defaults({}, BOTH)
    check_defaults({"temperature": 0, "max_tokens": 5, "stop": ["a"], "seed": 1}, BOTH)
    check_defaults({"logprobs": 3}, (COMPLETION_URL,))
