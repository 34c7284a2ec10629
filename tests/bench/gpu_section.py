"""A section of scripts/gpu_check that behaves as it is told."""

import os
import signal
import time
from typing import Any


def run(section: Any) -> None:
    section.row(what="first", is_rehearsal=section.is_rehearsal, has_an_hour=section.has(3600))
    print("a compiler says something")
    match section.options["behaviour"]:
        case "hang":
            time.sleep(600)
        case "fault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "raise":
            raise ValueError("no such instruction")
    section.row(what="last")
