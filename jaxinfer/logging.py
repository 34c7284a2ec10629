"""How jaxinfer logs: one logger, one format, to stderr. Knows nothing of what is logged.

Library code asks for `get_logger(__name__)` and never configures; the commands and the engine
process call `configure_logging` once. Without it Python's defaults hold, so a program that uses
`LLM` decides itself.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

ROOT = "jaxinfer"
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s {process} %(name)s: %(message)s"


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


@contextmanager
def log_phase(logger: logging.Logger, name: str) -> Iterator[None]:
    """Logs the start of a long phase, and its seconds at the end (also when it fails)."""
    logger.info("%s ...", name)
    start_s = time.monotonic()
    outcome = "failed after"
    try:
        yield
        outcome = "done in"
    finally:
        logger.info("%s %s %.1f s", name, outcome, time.monotonic() - start_s)
