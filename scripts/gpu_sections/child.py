"""The process of one section: python -m gpu_sections.child MODULE OPTIONS_AS_JSON.

A section is a function `run(section)`; what it finds it gives to `section.row` as soon as it has
it, and before each case it asks `section.has(seconds)`.
"""

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu_sections.parent import ROW


@dataclass(frozen=True, kw_only=True)
class SectionRun:
    """What a section is told, and how it answers."""

    options: dict[str, Any]
    end_s: float  # on time.monotonic()'s clock

    @property
    def is_rehearsal(self) -> bool:
        """No GPU: tiny sizes, interpreters, and nothing to be believed about speed."""
        return self.options["platform"] == "cpu"

    def row(self, **fields: Any) -> None:
        print(ROW + json.dumps(fields), flush=True)

    @property
    def left_s(self) -> float:
        return self.end_s - time.monotonic()

    def has(self, seconds: float) -> bool:
        """Whether so much of the section's time is left."""
        return self.left_s >= seconds


def main(argv: Sequence[str]) -> int:
    module, options = argv[0], json.loads(argv[1])
    limit_s = options["limit_s"]
    signal.alarm(round(limit_s) + 30)  # should the parent be gone; ends a process stuck in C too
    section = SectionRun(options=options, end_s=time.monotonic() + limit_s)
    importlib.import_module(module).run(section)
    return 0


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(exit_code)  # without waiting for what still compiles
