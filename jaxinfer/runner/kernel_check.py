"""A GPU's kernels are tried in a child process before they are used, and the verdict is kept.

Knows processes, time limits and files; what is checked, and how, is pallas_kernels'. A kernel that
hangs or faults ends the child, not the engine, which then takes the next implementation.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from jaxinfer.config.env import child_environment
from jaxinfer.logging import get_logger
from pallas_kernels.dispatch import KernelSet
from pallas_kernels.paged_attention.check import CheckReport
from pallas_kernels.paged_attention.check_main import CheckRequest, read_output
from pallas_kernels.paged_attention.gpu_choice import GpuBackend, GpuRequest

logger = get_logger(__name__)

CHECK_COMMAND = (sys.executable, "-m", "pallas_kernels.paged_attention.check_main")
LIMIT_S = 180.0  # a cold start of JAX on eight GPUs, and four small compilations
_GRACE_S = 10.0  # a process whose device hangs may not end when it is killed
_LONGEST_REASON = 300  # characters
_ENVIRONMENT: Mapping[str, str] = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The engine may hold most of the memory already: the child takes megabytes, as it needs them."""


class _Ending(NamedTuple):
    """How a child ended."""

    output: str
    errors: str
    exit_code: int | None  # None: it was killed at its time limit


@dataclass(frozen=True, kw_only=True)
class ChildCheck:
    """Checks the kernels that were chosen for `request`; see checked.Check.

    `identity` is all that a verdict depends on besides the request: sources, versions, the device.
    Verdicts are kept in `directory`; None keeps none.
    """

    request: GpuRequest
    identity: str
    directory: Path | None
    command: tuple[str, ...] = CHECK_COMMAND
    limit_s: float = LIMIT_S

    def __call__(self, kernels: KernelSet) -> CheckReport:
        backend = kernels.attention_backend
        asked = CheckRequest(
            backend=cast(GpuBackend, backend),  # it was chosen for a GPU
            device=self.request.device,
            shape=self.request.shape,
            limit_s=self.limit_s + _GRACE_S,
        )
        path = self._path(asked)
        kept = None if path is None else _read(path)
        if kept is not None:
            logger.info("the check of %s is remembered: %s", backend, path)
            return kept
        ending, seconds = self._run(asked)
        has_device, report = read_output(ending.output)
        if report is None:
            report = CheckReport(float("nan"), _reason(ending, self.limit_s), seconds)
        if report.failure is not None:
            logger.warning("kernel %s failed its check: %s", backend, report.failure)
        # Without a device nothing was learnt about the kernel.
        if path is not None and has_device:
            _write(path, report, asked)
        return report

    def _run(self, asked: CheckRequest) -> tuple[_Ending, float]:
        start_s = time.monotonic()
        process = subprocess.Popen(
            [*self.command, asked.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(**_ENVIRONMENT),
            start_new_session=True,  # compilers that it starts end with it
            text=True,
            errors="replace",
        )
        try:
            output, errors = process.communicate(timeout=self.limit_s)
            ending = _Ending(output, errors, process.returncode)
        except subprocess.TimeoutExpired as late:
            ending = _Ending(_text(late.stdout), _text(late.stderr), None)
        finally:
            if process.poll() is None:
                _kill(process)
        return ending, time.monotonic() - start_s

    def _path(self, asked: CheckRequest) -> Path | None:
        if self.directory is None:
            return None
        text = f"{self.identity}\n{replace(asked, limit_s=0).to_json()}"  # any limit: one verdict
        return self.directory / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"


def _kill(process: "subprocess.Popen[str]") -> None:
    """Ends the child and what it started; does not wait for ever for a process that cannot end."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_GRACE_S)


def _text(captured: Any) -> str:
    """What TimeoutExpired holds: bytes, even of a process whose output is text, or None."""
    if isinstance(captured, bytes):
        return captured.decode(errors="replace")
    return captured or ""


def _reason(ending: _Ending, limit_s: float) -> str:
    """Why there is no report."""
    lines = [line.strip() for line in ending.errors.splitlines() if line.strip()]
    last = f": {lines[-1][:_LONGEST_REASON]}" if lines else ""
    has_device, _ = read_output(ending.output)
    what = "the check" if has_device else "a process for the check, which found no device,"
    if ending.exit_code is None:
        return f"{what} did not end within {limit_s:g} s{last}"
    if ending.exit_code < 0:
        return f"{what} ended by {signal.Signals(-ending.exit_code).name}{last}"
    return f"{what} ended with code {ending.exit_code}{last}"


def _read(path: Path) -> CheckReport | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return CheckReport(**fields["report"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the kept check %s is not readable (%s): checking again", path, error)
        return None


def _write(path: Path, report: CheckReport, asked: CheckRequest) -> None:
    """Kept for the next start; a full disk is no reason to stop."""
    content = {"report": report._asdict(), "of": json.loads(asked.to_json())}
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        logger.warning("the check of a kernel cannot be kept: %s", error)
