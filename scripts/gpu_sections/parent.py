"""Runs sections as child processes with time limits, and collects what they say.

Knows processes, lines and clocks; no JAX and nothing of what the sections measure.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpu_sections.plan import Section

SCRIPTS = Path(__file__).parents[1]
ROW = "@row "  # begins a line that is a row as JSON
_MOST_AT_ONCE = 4
_LEAST_S = 8.0  # less than this is no time to start JAX in
_GRACE_S = 5.0
_print_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When everything began and must be over, on time.monotonic()'s clock."""

    start_s: float
    end_s: float

    @property
    def left_s(self) -> float:
        return self.end_s - time.monotonic()


@dataclass(kw_only=True)
class SectionResult:
    """What came of a section; `error` is None when it came to its end."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


def run_together(
    sections: list[Section], options: dict[str, Any], limits: Limits
) -> list[SectionResult]:
    """Some at a time; results in the order of the sections."""
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, len(sections))) as pool:
        return list(pool.map(lambda section: run_section(section, options, limits), sections))


def run_section(section: Section, options: dict[str, Any], limits: Limits) -> SectionResult:
    """Starts the child, prints what it says with the time, and ends it when its time is up."""
    result = SectionResult(name=section.name)
    limit_s = min(section.limit_s, limits.left_s)
    if limit_s < _LEAST_S:
        result.error = f"skipped: {max(limit_s, 0):.0f} s of the budget are left"
        _say(limits, section.name, result.error)
        return result
    start_s = time.monotonic()
    _say(limits, section.name, f"starts, at most {limit_s:.0f} s")
    process = _start(section, {**options, **section.options, "limit_s": limit_s})
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=6)  # what it said last, for the reason
    reader = threading.Thread(
        target=_read, args=(process.stdout, result.rows, tail, limits, section.name), daemon=True
    )
    reader.start()
    try:
        exit_code: int | None = process.wait(limit_s + _GRACE_S)
    except subprocess.TimeoutExpired:
        exit_code = None
    finally:
        _end(process)
    reader.join(_GRACE_S)
    result.seconds = time.monotonic() - start_s
    result.error = _error(exit_code, limit_s, list(tail))
    _say(limits, section.name, f"{result.error or 'done'} ({result.seconds:.1f} s)")
    return result


def _start(section: Section, options: dict[str, Any]) -> "subprocess.Popen[str]":
    path = [str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
    if not section.is_timed:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several share the device
    if options["platform"] == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    return subprocess.Popen(
        [sys.executable, "-m", "gpu_sections.child", section.module, json.dumps(options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )


def _read(
    stream: IO[str],
    rows: list[dict[str, Any]],
    tail: "deque[str]",
    limits: Limits,
    name: str,
) -> None:
    with stream:
        for raw in stream:
            line = raw.rstrip()
            if line.startswith(ROW):
                rows.append(json.loads(line.removeprefix(ROW)))
                _say(limits, name, _short(rows[-1]))
            elif line:
                tail.append(line)


def _end(process: "subprocess.Popen[str]") -> None:
    """The child and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a device that hangs may keep it
        process.wait(_GRACE_S)


def _error(exit_code: int | None, limit_s: float, tail: list[str]) -> str | None:
    if exit_code == 0:
        return None
    said = ": " + " | ".join(tail[-3:])[-600:] if tail else ""
    if exit_code is None:
        return f"ended at its limit of {limit_s:.0f} s{said}"
    if exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}{said}"
    return f"failed with code {exit_code}{said}"


def _short(row: dict[str, Any]) -> str:
    return "  ".join(f"{key}={_number(value)}" for key, value in row.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(limits: Limits, name: str, text: str) -> None:
    with _print_lock:
        print(f"[{time.monotonic() - limits.start_s:6.1f} s] {name}: {text}", flush=True)
