"""The planner's child process: reads one request, answers with one line of JSON.

Started by launch.py with the environment that compilers of absent devices want. Everything else
that is written goes to stderr, so that the answer stands alone on stdout.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from jaxinfer.errors import CapacityError, UserError
from jaxinfer.logging import configure_logging, get_logger
from jaxinfer.planner.build import build_cache
from jaxinfer.planner.devices import prepare_stand_ins
from jaxinfer.planner.messages import BuildRequest, Failure, PlanRequest
from jaxinfer.planner.plan import make_plan
from jaxinfer.planner.topologies import parse_topology

_KINDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "PlanRequest": (PlanRequest, make_plan),
    "BuildRequest": (BuildRequest, build_cache),
}


def main(kind: str, log_level: str) -> int:
    """Answers on what was stdout; 0 also when the answer is an error of the user's."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # compilers print
    configure_logging(log_level, process="planner")
    if log_level == "warning":  # the usual one of `plan`: it compiles for a minute, and says so
        get_logger("jaxinfer.planner").setLevel(logging.INFO)
    request_type, function = _KINDS[kind]
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=request_type)
    try:
        prepare_stand_ins(parse_topology(request.topology))
        answer: Any = function(request)
    except (UserError, CapacityError) as error:
        answer = Failure(kind=type(error).__name__, message=str(error))
    with os.fdopen(answer_fd, "wb") as pipe:
        pipe.write(msgspec.json.encode(answer) + b"\n")
    return 0
