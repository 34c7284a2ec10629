"""`jaxinfer run` and `run-batch` as a process: the real ones, with a device that needs no
accelerator.

python -m tests.batch.run_fake FACTORY run|run-batch [arguments]

FACTORY is one of tests/engine/fake_runner.py, or "module:function".
"""

import functools
import importlib
import sys
from unittest.mock import patch

from jaxinfer.cli import batch_run, main


def start(factory: str, *argv: str) -> int:
    """The command in this process; its engine is a process of its own as always."""
    if ":" not in factory:
        factory = f"tests.engine.fake_runner:{factory}"
    run_job = functools.partial(batch_run.run_job, runner_factory=factory)
    module = importlib.import_module("jaxinfer.cli." + argv[0].replace("-", "_"))
    with patch.object(module, "run_job", run_job):
        return main.main(argv)


if __name__ == "__main__":
    status = start(*sys.argv[1:])
    assert "jax" not in sys.modules, "the process that reads and writes must never import jax"
    sys.exit(status)
