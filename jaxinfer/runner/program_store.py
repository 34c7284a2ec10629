"""Compiled programs on disk under names that are known before tracing: a warm start only reads.

JAX's own cache is asked for with the lowered program, so each start still traces and lowers every
bucket, one after the other (Python holds its lock). Here the name is a digest of everything that a
program is made from, the sources of this code included. An entry that is damaged, foreign or
from other versions is ignored with a line in the log, and the program is compiled.

Entries are machine code with pickled descriptions of arguments and results (JAX has no other form
of a loaded program): whoever can write one can run code as this user, and the checksum finds
damage, not intent. So the directory must belong to this user, or to root, and be writable by nobody
else; otherwise nothing is read from it.
"""

import hashlib
import logging
import os
import pickle
import platform
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled

import jaxinfer
import pallas_kernels
from jaxinfer.config.env import compiler_flags
from jaxinfer.errors import UserError
from jaxinfer.logging import get_logger
from jaxinfer.parallel.mesh import Device
from jaxinfer.runner.store_origin import SUFFIX, describe_difference, nearest_foreign, note_origin

logger = get_logger(__name__)

_MAGIC = b"jaxinfer program 1\n"
_DIGEST_BYTES = 32
_SUBDIRECTORY = "programs"  # of the compile cache
_MOST_ENTRIES = 200  # some MB each; those used last stay
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy")
_SOURCE_SUFFIXES = (".py", ".cc", ".h")
_JAX_OPTIONS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_default_prng_impl",
)


class Outcome(NamedTuple):
    """What came of a program that was asked for."""

    path: Path
    why_not: str | None  # it is not stored; None: it is


@dataclass(frozen=True, kw_only=True)
class ProgramStore:
    """A directory of programs, of which those of one origin and for these devices are seen."""

    directory: Path
    origin: str  # digest of what all programs have in common
    devices: tuple[Device, ...]
    reads: bool = True  # False where the devices are not here: nothing can be loaded for them
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # by a program's name; see `note`

    def load(self, identity: str) -> Compiled | None:
        """The program of this name, or None."""
        if not self.reads:
            return None
        path = self._path(identity)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("compiled program %s cannot be read: %s", path, error)
            return None
        header = len(_MAGIC) + _DIGEST_BYTES
        payload = content[header:]
        if content[:header] != _MAGIC + hashlib.sha256(payload).digest():
            return self._discard(path, "it is damaged")
        try:
            executable, in_tree, out_tree = pickle.loads(payload)
            compiled = serialize_executable.deserialize_and_load(
                executable, in_tree, out_tree, execution_devices=self.devices
            )
        except Exception as error:  # noqa: BLE001  (JAX names none, and there is another way)
            return self._discard(path, str(error))
        with suppress(OSError):
            os.utime(path)  # was used
        return compiled

    def save(self, identity: str, compiled: Compiled) -> str | None:
        """Keeps a program, if the backend can write it; a full disk is no reason to stop.

        Returns why it is not kept, or None.
        """
        try:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            logger.info("compiled programs cannot be stored here: %s", error)
            return f"it cannot be serialized: {error}"
        path = self._path(identity)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            unfinished.write_bytes(_MAGIC + hashlib.sha256(payload).digest() + payload)
            os.replace(unfinished, path)
        except OSError as error:
            logger.warning("a compiled program cannot be stored: %s", error)
            with suppress(OSError):
                unfinished.unlink()
            return f"it cannot be written: {error}"
        return None

    def note(self, name: str, identity: str, why_not: str | None) -> None:
        """Remembers what came of a program, for `check_kept`; `why_not` it is stored, or None."""
        self.outcomes[name] = Outcome(self._path(identity), why_not)

    def check_kept(self) -> None:
        """Raises UserError if a start would not find all programs that were noted; says why."""
        missing = {
            name: outcome.why_not or "its file is gone again"
            for name, outcome in self.outcomes.items()
            if outcome.why_not is not None or not outcome.path.is_file()
        }
        if missing:
            lines = (f"  {name}: {why_not}" for name, why_not in missing.items())
            raise UserError(
                f"{len(missing)} of {len(self.outcomes)} programs are not stored in "
                f"{self.directory}:\n" + "\n".join(lines)
            )

    def _discard(self, path: Path, reason: str) -> None:
        logger.warning("compiled program %s is deleted and compiled again: %s", path, reason)
        with suppress(OSError):
            path.unlink()

    def _path(self, identity: str) -> Path:
        digest = hashlib.sha256(f"{self.origin}\n{identity}".encode()).hexdigest()
        return self.directory / f"{digest[:40]}.program"


def open_store(
    directory: str, devices: Sequence[Device], facts: Mapping[str, Any], *, reads: bool = True
) -> ProgramStore | None:
    """The store in a compile cache directory, which exists; None for "none".

    `facts` are what makes an engine's programs others than those of another engine on the same
    devices: the model's configuration and the settings, as values whose `repr` says everything.
    Without `reads` programs are only written, over those that are there.
    """
    if directory == "none":
        return None
    own = Path(directory) / _SUBDIRECTORY
    if not _is_private(own):
        return None
    lines = _origin_lines(devices, facts)
    origin = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    foreign = nearest_foreign(own, origin, lines)
    if foreign is not None:
        is_same_engine = not foreign.keys() & facts.keys()
        logger.log(
            logging.WARNING if is_same_engine else logging.INFO,
            "the compiled programs in %s are ignored, new ones are made: theirs is another %s",
            own,
            describe_difference(foreign),
        )
    note_origin(own, origin, lines)
    _delete_oldest(own)
    return ProgramStore(directory=own, origin=origin, devices=tuple(devices), reads=reads)


def check_stored(store: ProgramStore | None, directory: str) -> None:
    """Raises UserError if a later start would not find all programs of this one in `directory`.

    For whoever compiles only to store. `store` is None where open_store refused the directory.
    """
    if store is None:
        raise UserError(
            f"no program was stored: {Path(directory) / _SUBDIRECTORY} must be a directory of this "
            "user (or of root) that nobody else can write. Repair it (chmod 700), or name another."
        )
    store.check_kept()


def _origin_lines(devices: Sequence[Device], facts: Mapping[str, Any]) -> list[str]:
    """All that programs depend on, besides their function; a name and a value each."""
    client = devices[0].client
    lines = [
        *(f"{name} {version(name)}" for name in _LIBRARIES),
        *(f"{name} {getattr(jax.config, name)}" for name in _JAX_OPTIONS),
        f"python {platform.python_version()}",
        f"platform {client.platform} {_on_one_line(client.platform_version)} {compiler_flags()}",
        f"devices {[(device.id, device.device_kind) for device in devices]}",
        f"sources {_digest_of_sources()}",
        *(f"{name} {value!r}" for name, value in sorted(facts.items())),
    ]
    if devices[0].platform == "cpu":  # loops are cut for so many threads
        lines.append(f"processor {_processor()} x {os.cpu_count()}")
    return lines


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _is_private(directory: Path) -> bool:
    """Makes the directory; False, with a line in the log, if others could put files into it."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        logger.warning("compiled programs are not stored: %s", error)
        return False
    # What root put there, as in a container's image, is trusted like this code.
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid in (os.geteuid(), 0)
    if is_own and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return True
    logger.warning(
        "compiled programs are not stored: %s must be a directory of this user (or of root) that "
        "nobody else can write (chmod 700), since programs are run as they are found there",
        directory,
    )
    return False


def _delete_oldest(directory: Path) -> None:
    """Versions and settings come and go; their programs would stay for ever."""
    found: dict[bool, list[tuple[float, Path]]] = {False: [], True: []}
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # another process did the same
            found[path.suffix == SUFFIX].append((path.stat().st_mtime, path))
    for kind in found.values():
        for _, path in sorted(kind)[:-_MOST_ENTRIES]:
            with suppress(OSError):
                path.unlink()


def _processor() -> str:
    """What machine code may rely on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _digest_of_sources() -> str:
    return digest_of_sources(jaxinfer, pallas_kernels)


def digest_of_sources(*packages: ModuleType) -> str:
    """Of all that these packages do."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(Path(package.__path__[0]).rglob("*")):
            if path.suffix in _SOURCE_SUFFIXES:
                digest.update(path.read_bytes())
    return digest.hexdigest()
