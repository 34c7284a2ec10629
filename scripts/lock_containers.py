"""Writes configs/containers/constraints.txt: one exact version of all that the images install.

    .venv/bin/python scripts/lock_containers.py [--jax VERSION]

One file for all variants: a CPU, a GPU and a TPU image of one commit differ by their plugins
only. Versions come from pip's own resolver, asked once a variant with what it chose before held
fast; JAX stays at the version that the file has, unless another is named. Knows pyproject.toml and
pip; not the Containerfiles.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "configs/containers/constraints.txt"
VARIANTS = ("", "tpu", "gpu", "rocm", "batch")  # extras that an image may be built with
HEADER = """\
# Made by scripts/lock_containers.py: what the images install, for all variants. Not to be edited.
"""


def pins_in(text: str) -> dict[str, str]:
    """Package -> version of the lines `package==version`."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def requirements(project: dict, extra: str) -> list[str]:
    """Of one variant: the package's own, the extra's, and what builds it."""
    wanted = ["pip", *project["build-system"]["requires"], *project["project"]["dependencies"]]
    if extra:
        wanted += project["project"]["optional-dependencies"][extra]
    return wanted


def resolve(wanted: list[str], pins: dict[str, str]) -> dict[str, str]:
    """Package -> version that pip would install, nothing being installed."""
    with tempfile.TemporaryDirectory() as scratch:
        constraints, report = Path(scratch) / "constraints.txt", Path(scratch) / "report.json"
        constraints.write_text("".join(f"{name}=={at}\n" for name, at in pins.items()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--dry-run", "--ignore-installed", "--only-binary", ":all:"]
        command += ["--report", str(report), "--constraint", str(constraints), *wanted]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    return {
        re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"]
        for item in found
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Pins what the images install.")
    parser.add_argument("--jax", help="JAX's version (default: that of the file)")
    jax = parser.parse_args().jax or pins_in(LOCK.read_text())["jax"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = {"jax": jax, "jaxlib": jax}
    for extra in VARIANTS:
        pins |= resolve(requirements(project, extra), pins)
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    LOCK.write_text(HEADER + "".join(lines))
    print(f"{LOCK.relative_to(ROOT)}: {len(lines)} packages, JAX {jax}")


if __name__ == "__main__":
    main()
