"""`jaxinfer serve` as a process, and a plain HTTP client for it that checks what it is sent."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import openai

from tests.quick_xla import QUICK_XLA_FLAGS

READY_WITHIN_S = 280.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Response(NamedTuple):
    """What came back, whole."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(kw_only=True)
class Choice:
    """A choice of an answer, or of a stream put together again."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_frames: int = 0


@dataclass(kw_only=True)
class Answer:
    """What the client makes of an answer: equal for a stream and a body."""

    choices: list[Choice]
    usage: Any = None
    frames: list[Any] = field(default_factory=list)

    @property
    def only(self) -> Choice:
        [choice] = self.choices
        return choice


@dataclass(kw_only=True)
class Api:
    """A running server."""

    port: int
    key: str
    process: subprocess.Popen[str]
    openai: openai.OpenAI
    log: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> Response:
        """One request on a connection of its own; `body` is sent as JSON."""
        with closing(self.connect()) as connection:
            return exchange(connection, method, path, body, headers=headers, key=self.key)

    def get(self, path: str) -> Response:
        return self.request("GET", path)

    def post(self, path: str, body: Any, *, status: int = 200) -> Any:
        response = self.request("POST", path, body)
        assert response.status == status, response.text
        return response.json()

    def whole(self, path: str, **body: Any) -> Answer:
        return read_answer(self.post(path, body))

    def stream(self, path: str, **body: Any) -> Answer:
        response = self.request("POST", path, {**body, "stream": True})
        assert response.status == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return read_stream(response.text)

    def complete(self, prompt: Any = "Once upon", **body: Any) -> Choice:
        """One choice of a greedy completion of eight tokens, unless `body` says otherwise."""
        settings = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
        return self.whole(COMPLETIONS, prompt=prompt, **settings | body).only

    def metrics(self) -> dict[str, float]:
        """Samples by name and labels, as they are spelt."""
        text = self.get("/metrics").text
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def together(self, bodies: list[tuple[str, dict[str, Any]]]) -> list[Answer]:
        """All at once, each on a connection of its own."""

        def send(item: tuple[str, dict[str, Any]]) -> Answer:
            path, body = item
            return (self.stream if body.pop("stream", False) else self.whole)(path, **body)

        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(send, bodies))


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    key: str = "none",
) -> Response:
    """A request and its response; the connection can be used again."""
    all_headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    payload = None if body is None else json.dumps(body).encode()
    connection.request(method, path, payload, all_headers | dict(headers or {}))
    response = connection.getresponse()
    text = response.read().decode()
    names = {name.lower(): value for name, value in response.getheaders()}
    return Response(response.status, names, text)


def read_answer(body: dict[str, Any]) -> Answer:
    """A whole answer of either route."""
    choices = []
    for index, choice in enumerate(body["choices"]):
        assert choice["index"] == index
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        choices.append(
            Choice(
                text=text,
                token_ids=choice.get("token_ids") or [],
                prompt_token_ids=choice.get("prompt_token_ids") or body.get("prompt_token_ids"),
                logprobs=choice["logprobs"],
                finish_reason=choice["finish_reason"],
                stop_reason=choice["stop_reason"],
            )
        )
    return Answer(choices=choices, usage=body["usage"])


def read_stream(text: str) -> Answer:
    """Puts a stream together; asserts what holds for every one."""
    events = text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events), text
    assert events.pop() == "data: [DONE]"
    frames = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({(frame["id"], frame["created"], frame["model"]) for frame in frames}) == 1
    choices: dict[int, Choice] = {}
    usage = None
    for frame in frames:
        usage = frame.get("usage") or usage
        for part in frame["choices"]:
            _take_part(choices.setdefault(part["index"], Choice()), part, frame)
    assert all(choice.finish_reason is not None for choice in choices.values())
    return Answer(choices=[choices[i] for i in range(len(choices))], usage=usage, frames=frames)


def _take_part(choice: Choice, part: dict[str, Any], frame: dict[str, Any]) -> None:
    assert choice.finish_reason is None, "finish_reason stands in a choice's last frame only"
    delta = part.get("delta")
    if delta is not None:
        assert ("role" in delta) == (choice.num_frames == 0), "the role comes first, and once"
    choice.num_frames += 1
    choice.text += (part["text"] if delta is None else delta.get("content")) or ""
    choice.token_ids += part.get("token_ids") or []
    choice.prompt_token_ids = (
        choice.prompt_token_ids or part.get("prompt_token_ids") or frame.get("prompt_token_ids")
    )
    if part["logprobs"] is not None:
        choice.logprobs = choice.logprobs or {name: [] for name in part["logprobs"]}
        for name, values in part["logprobs"].items():
            choice.logprobs[name] += values
    choice.finish_reason = part["finish_reason"]
    choice.stop_reason = part.get("stop_reason")


@contextmanager
def serving(
    model: Path, *flags: str, key: str = "none", xla_flags: str = QUICK_XLA_FLAGS
) -> Iterator[Api]:
    """Runs `jaxinfer serve MODEL FLAGS` on a free port until it is ready; ends it by SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxinfer.cli.main", "serve", str(model), "--port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": xla_flags},
        start_new_session=True,
    )
    assert process.stderr is not None
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            lines.append(line)
            if "ready: http" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(READY_WITHIN_S), "".join(lines)
        found = re.search(r"ready: (http://127.0.0.1:\d+)", "".join(lines))
        assert found, "".join(lines)
        base_url = f"{found[1]}/v1"
        with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
            port = int(found[1].rpartition(":")[2])
            yield Api(port=port, key=key, process=process, openai=client, log=lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, "".join(lines)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(5)
        process.stderr.close()


def until(condition: Any, *, timeout_s: float = 5.0) -> None:
    """Returns when `condition()` holds; fails after `timeout_s`."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)
