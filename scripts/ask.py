"""Helper of scripts/quickstart: waits for a server, asks it one question, or tells how to.

Talks HTTP like any client; imports nothing but the standard library.
"""

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

POLL_S = 0.2
SHOW_EVERY_S = 10.0
AMOUNT = re.compile(r" \d+/\d+( MiB)?$")
STOP_S = 20.0

CURL = """
Ready. In another terminal:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
"""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def not_ready(url: str) -> str | None:
    """None when every shape is compiled; else what the server says it is doing ("" for nothing)."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return None
    except urllib.error.HTTPError as error:
        try:
            return json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return f"/ready answers {error.code}"
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return ""


class Phases:
    """Shows how far the start is: one moving line on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._phase = self._text = ""
        self._shown_s = self._began_s = time.monotonic()

    def show(self, message: str) -> None:
        """`message` is what /ready says: "Not ready: starting: compile 3/10." """
        text = message.removeprefix("Not ready: ").removeprefix("starting: ").rstrip(".")
        if not text:
            return
        phase, now_s = AMOUNT.sub("", text), time.monotonic()
        is_new = phase != self._phase
        if is_new:
            self.end()
            self._phase, self._began_s = phase, now_s
        if self._is_terminal:
            print(f"\r\x1b[K  {text} ({now_s - self._began_s:.0f} s)", end="", file=sys.stderr)
            sys.stderr.flush()
        elif is_new or (now_s - self._shown_s > SHOW_EVERY_S and text != self._text):
            self._shown_s, self._text = now_s, text
            print(f"  {text} ...", file=sys.stderr)

    def end(self) -> None:
        """The phase is over: on a terminal its line stays."""
        if self._is_terminal and self._phase:
            print(file=sys.stderr)


def wait_until_ready(url: str, is_running: Callable[[], bool], phases: Phases | None) -> bool:
    """True once the server is ready; False when it has ended before."""
    try:
        while is_running():
            state = not_ready(url)
            if state is None:
                return True
            if phases is not None:
                phases.show(state)
            time.sleep(POLL_S)
        return False
    finally:
        if phases is not None:
            phases.end()


def stream_answer(url: str, question: str) -> None:
    """Prints the answer to `question` piece by piece."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_completion_tokens": 256,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
    print()


def ask(question: str, flags: Sequence[str]) -> int:
    """Starts a server on a free port, asks, and stops it."""
    port = free_port()
    jaxinfer = Path(sys.executable).with_name("jaxinfer")
    command = [str(jaxinfer), "serve", "--log-level", "warning", *flags]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=sys.stderr)  # stdout is for the answer
    url = f"http://127.0.0.1:{port}"
    try:
        print(
            "Starting the server (the first start compiles, and keeps the result) ...",
            file=sys.stderr,
        )
        start_s = time.monotonic()
        if not wait_until_ready(url, lambda: server.poll() is None, Phases()):
            print(f"The server ended with status {server.wait()}.", file=sys.stderr)
            return 1
        print(f"Ready after {time.monotonic() - start_s:.1f} s.", file=sys.stderr)
        stream_answer(url, question)
        return 0
    except urllib.error.HTTPError as error:
        print(f"The server answered {error.code}: {error.read().decode()}", file=sys.stderr)
        return 1
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()


def process_exists(pid: int) -> bool:
    """Whether there is a process `pid` that this one may signal."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def announce(url: str, pid: int) -> int:
    """Prints a curl line when the server of process `pid` is ready."""
    if wait_until_ready(url, lambda: process_exists(pid), None):
        print(CURL.format(url=url), flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--question")
    parser.add_argument("--announce", metavar="URL")
    parser.add_argument("--pid", type=int)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    try:
        if args.announce:
            return announce(args.announce, args.pid)
        return ask(args.question, args.flags)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
