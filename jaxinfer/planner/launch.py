"""Asks a child process: compilers of devices that are not here want a process of their own.

They read the environment when they are loaded, and JAX must not look for devices. The child gets a
request as JSON on its stdin, answers with one line on its stdout, and logs to our stderr. Imports
no JAX.
"""

import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

import msgspec

from jaxinfer import errors
from jaxinfer.config.env import child_environment
from jaxinfer.errors import CapacityError, JaxInferError, UserError
from jaxinfer.logging import get_logger
from jaxinfer.planner.messages import BuildRequest, BuildResult, Failure, PlanRequest, PlanResult

logger = get_logger(__name__)

COMPILER_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "JAX_PLATFORMS": "cpu",  # no device is looked for
        "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask its cloud which TPU this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it runs nothing, so others may use libtpu meanwhile
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
)

RequestT = TypeVar("RequestT", PlanRequest, BuildRequest)
AnswerT = TypeVar("AnswerT")

_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)  # not SIGKILL: memory ran out then


class PlannerDiedError(JaxInferError):
    """The child process ended without an answer: a compiler crashed, or memory ran out."""


def plan(request: PlanRequest, *, log_level: str) -> PlanResult:
    """Raises the UserError that the child met, and PlannerDiedError when it died."""
    return _ask(request, PlanResult, log_level)


def build(request: BuildRequest, *, log_level: str) -> BuildResult:
    """As `plan`; CapacityError for what does not fit."""
    return _ask(request, BuildResult, log_level)


def _ask(request: RequestT, answer: type[AnswerT], log_level: str) -> AnswerT:
    result = _run_child(request, log_level)
    workers = request.engine.compile.num_compile_workers
    if -result.returncode in _CRASHES and workers != 1:
        # libtpu has crashed while it compiled two programs at a time; alone, the same ones went.
        logger.warning(
            "the compiler crashed (signal %d): again, one program at a time", -result.returncode
        )
        alone = replace(request.engine.compile, num_compile_workers=1)
        engine = replace(request.engine, compile=alone)
        result = _run_child(msgspec.structs.replace(request, engine=engine), log_level)
    lines = result.stdout.splitlines()
    if result.returncode != 0 or not lines:
        how = f"signal {-result.returncode}" if result.returncode < 0 else result.returncode
        raise PlannerDiedError(
            f"the planner's process ended early ({how}); its log above says why. If memory ran "
            "out: --num-compile-workers 1 takes less, and plan --no-compile gives the arithmetic "
            "alone."
        )
    decoded = msgspec.json.decode(lines[-1], type=answer | Failure)  # type: ignore[operator]
    if isinstance(decoded, Failure):
        raise _error(decoded)
    return decoded


def _run_child(
    request: PlanRequest | BuildRequest, log_level: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-P", "-c", _code_of_child(type(request).__name__, log_level)],
        input=msgspec.json.encode(request),
        stdout=subprocess.PIPE,
        env=child_environment(**COMPILER_ENVIRONMENT),
        check=False,
    )


def _code_of_child(kind: str, log_level: str) -> str:
    return (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from jaxinfer.planner.process import main; sys.exit(main({kind!r}, {log_level!r}))"
    )


def _error(failure: Failure) -> JaxInferError:
    known = vars(errors).get(failure.kind)
    if isinstance(known, type) and issubclass(known, UserError | CapacityError):
        return known(failure.message)
    return UserError(failure.message)
