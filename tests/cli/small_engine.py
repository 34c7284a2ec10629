"""An engine that starts fast, the same for all tests here, so that it compiles once."""

import os
import subprocess
import sys

SMALL_ENGINE = (
    "--max-model-len=256",
    "--max-num-seqs=2",
    "--max-num-batched-tokens=64",
    "--num-gpu-blocks-override=64",
)


def run_with_small_engine(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """`jaxinfer ARGV` on the real model, with the XLA flags that users have: none."""
    return subprocess.run(
        [sys.executable, "-m", "jaxinfer.cli.main", *argv, *SMALL_ENGINE],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=240,
        env={**os.environ, "XLA_FLAGS": ""},
    )
