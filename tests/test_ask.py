"""scripts/ask.py: what a newcomer sees while the first start takes its time."""

import importlib.util
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "ask.py"


@pytest.fixture(scope="module")
def ask() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ask", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


MESSAGES = (
    "Not ready: starting: download model-135M.gguf 3/94 MiB.",
    "Not ready: starting: download model-135M.gguf 94/94 MiB.",
    "",
    "Not ready: starting: compile 0/8.",
    "Not ready: starting: compile 1/8.",
    "Not ready: starting: allocate.",
)


def test_a_log_gets_a_line_a_phase(ask: ModuleType, capsys: pytest.CaptureFixture[str]):
    phases = ask.Phases()
    for message in MESSAGES:
        phases.show(message)
    phases.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  download model-135M.gguf 3/94 MiB ...",
        "  compile 0/8 ...",
        "  allocate ...",
    ]


def test_a_terminal_gets_one_moving_line_a_phase(ask: ModuleType, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    phases = ask.Phases()
    for message in MESSAGES:
        phases.show(message)
    phases.end()
    last_words = [line.rpartition("\x1b[K")[2] for line in terminal.getvalue().split("\n")[:-1]]
    assert last_words == [
        "  download model-135M.gguf 94/94 MiB (0 s)",
        "  compile 1/8 (0 s)",
        "  allocate (0 s)",
    ]


@pytest.fixture
def starting_server() -> Iterator[str]:
    """The URL of a server whose /ready is 503 twice and then 200."""
    messages = ["Not ready: starting: compile 1/8.", "Not ready: starting: load weights 1/2."]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the library's name
            message = messages.pop(0) if messages else None
            self.send_response(200 if message is None else 503)
            self.end_headers()
            self.wfile.write(json.dumps({"error": {"message": message}}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_waiting_ends_when_the_server_is_ready(
    ask: ModuleType, starting_server: str, capsys: pytest.CaptureFixture[str]
):
    assert ask.wait_until_ready(starting_server, lambda: True, ask.Phases())
    shown = capsys.readouterr().err
    assert "compile 1/8" in shown and "load weights 1/2" in shown


def test_waiting_ends_when_the_server_is_gone(ask: ModuleType):
    url = f"http://127.0.0.1:{ask.free_port()}"
    states = iter([True, True, False])
    assert not ask.wait_until_ready(url, lambda: next(states), None)
