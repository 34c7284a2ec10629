"""A compiler that crashes in the planner's child process."""

import os
import signal
from collections.abc import Callable

import msgspec
import pytest

from jaxinfer.config.schema import EngineConfig
from jaxinfer.planner import launch
from jaxinfer.planner.messages import BuildRequest, BuildResult

REQUEST = BuildRequest(
    config_path="config.json", engine=EngineConfig(), topology="v6e:1x1", directory="d"
)
ANSWER = BuildResult(
    topology="v6e:1x1",
    directory="d",
    num_programs=7,
    num_bytes=2,
    serve_flags="",
    notes=[],
    wall_s=1.0,
)
# Dies by a signal unless it is told to compile one program at a time.
CHILD = """
import json, os, sys
request = json.load(sys.stdin)
if request["engine"]["compile"]["num_compile_workers"] != {good!r}:
    os.kill(os.getpid(), {signal})
print({answer!r})
"""


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`crash(SIGSEGV, good=1)`: what the next child does."""

    def arrange(number: signal.Signals, *, good: int | None) -> None:
        answer = msgspec.json.encode(ANSWER).decode()
        code = CHILD.format(signal=int(number), good=good, answer=answer)
        monkeypatch.setattr(launch, "_code_of_child", lambda kind, log_level: code)

    return arrange


def test_a_compiler_that_crashed_gets_one_program_at_a_time(
    crash: Callable[..., None], caplog: pytest.LogCaptureFixture
):
    crash(signal.SIGSEGV, good=1)
    assert launch.build(REQUEST, log_level="info") == ANSWER
    assert "one program at a time" in caplog.text


@pytest.mark.parametrize(("number", "times"), [(signal.SIGABRT, 2), (signal.SIGKILL, 1)])
def test_what_crashes_again_or_has_no_memory_is_an_error(
    crash: Callable[..., None], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, times: int
):
    crash(number, good=99)
    runs: list[int] = []
    run = launch._run_child
    monkeypatch.setattr(launch, "_run_child", lambda *args: runs.append(os.getpid()) or run(*args))
    with pytest.raises(launch.PlannerDiedError, match=f"signal {int(number)}"):
        launch.build(REQUEST, log_level="info")
    assert len(runs) == times
