"""How jaxinfer logs: one logger, one format, to stderr. Knows nothing of what is logged.

Library code asks for `get_logger(__name__)` and never configures; the commands and the engine
process call `configure_logging` once. Without it Python's defaults hold, so a program that uses
`LLM` decides itself.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

ROOT = "jaxinfer"
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s {process} %(name)s: %(message)s"
_TELL_EVERY_S = 30.0


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of jaxinfer."""
    assert name == ROOT or name.startswith(f"{ROOT}."), name
    return logging.getLogger(name)


def configure_logging(level: str = "info", *, process: str = "main") -> None:
    """Sends jaxinfer's log lines to stderr; calling it again changes level and process name.

    `level` is one of debug, info, warning, error; `process` names this process in each line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT.format(process=process), "%m-%d %H:%M:%S"))
    logger = logging.getLogger(ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False  # or a root handler of someone's prints every line twice


class Phase:
    """A long piece of work that is under way. `detail` may be set from any thread."""

    def __init__(self) -> None:
        self.detail = ""  # what exactly is being done: a file, a program


@contextmanager
def log_phase(
    logger: logging.Logger, name: str, *, tell_every_s: float = _TELL_EVERY_S
) -> Iterator[Phase]:
    """Logs the start of a long phase, and its seconds at the end (also when it fails).

    In between a thread of its own says every `tell_every_s` seconds that the phase still runs, and
    its `detail`: whatever hangs, even in C++, is named (a warning if the detail is the same again).
    """
    logger.info("%s ...", name)
    start_s = time.monotonic()
    outcome = "failed after"
    phase, is_over = Phase(), threading.Event()

    def watch() -> None:
        last = phase.detail
        while not is_over.wait(tell_every_s):
            detail = phase.detail
            level = logging.WARNING if detail == last else logging.INFO  # it moves
            shown = f" ({detail})" if detail else ""
            logger.log(level, "still in %s%s after %.0f s", name, shown, time.monotonic() - start_s)
            last = detail

    watcher = threading.Thread(target=watch, name=f"watch {name}", daemon=True)
    watcher.start()
    try:
        yield phase
        outcome = "done in"
    finally:
        is_over.set()
        watcher.join()
        logger.info("%s %s %.1f s", name, outcome, time.monotonic() - start_s)
