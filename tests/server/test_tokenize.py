"""/tokenize renders messages as the chat route does, and long ones off the event loop."""

import threading
from typing import Any

import pytest

from tests.server.conftest import Served

SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}]},
    ],
)
async def test_the_same_tokens_as_in_chat(served: Served, options: dict[str, Any]) -> None:
    body = {"messages": SAID, **options}
    _, tokenized = await served.post("/tokenize", body)
    _, answer = await served.post(
        "/v1/chat/completions", {**body, "max_tokens": 1, "return_token_ids": True}
    )
    assert tokenized["tokens"] == answer["prompt_token_ids"]


async def test_what_excludes_each_other_is_refused(served: Served) -> None:
    body = {"messages": SAID, "continue_final_message": True, "add_generation_prompt": True}
    for path in ("/tokenize", "/v1/chat/completions"):
        status, answer = await served.post(path, body)
        assert status == 400
        assert answer["error"]["param"] == "continue_final_message"
        assert "add_generation_prompt=true" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
@pytest.mark.parametrize(("num_chars", "off_the_loop"), [(10, False), (30_000, True)])
async def test_long_messages_are_rendered_off_the_loop(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    num_chars: int,
    off_the_loop: bool,
) -> None:
    tokenizer, threads = served.engine.tokenizer, []
    render = tokenizer.render_chat

    def watched(*args: Any, **options: Any) -> str:
        threads.append(threading.current_thread())
        return render(*args, **options)

    monkeypatch.setattr(tokenizer, "render_chat", watched)
    await served.post(path, {"messages": [{"role": "user", "content": "x" * num_chars}]})
    (thread,) = threads
    assert (thread is not threading.current_thread()) == off_the_loop
