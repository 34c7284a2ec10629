"""Compiles every program the runner will call, before the engine is ready, and watches for more.

Programs are compiled ahead of time in a thread pool (XLA releases the GIL) and kept on disk twice:
in a ProgramStore, from which the same engine's next start reads them without tracing, and in JAX's
cache, which also serves other settings and sources that come to the same program. Knows functions
and shapes, no model.
"""

import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

from jaxinfer.errors import ConfigError
from jaxinfer.logging import get_logger
from jaxinfer.runner.program_store import ProgramStore

logger = get_logger(__name__)

_BACKEND_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_WRITE_EVENT = "/jax/compilation_cache/cache_misses"
_NOT_NEW = (
    "JAX's own cache had it, and what is read from there cannot be stored; an empty directory has "
    "no such cache"
)


CompilerOptions = Mapping[str, Any]


class Program(NamedTuple):
    """A function and the abstract arguments it is compiled for."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct with shardings
    donate: tuple[int, ...]

    def compile(self, options: CompilerOptions) -> Compiled:
        lowered = jax.jit(self.function, donate_argnums=self.donate).lower(*self.args)
        return compile_lowered(lowered, options)

    def describe(self) -> str:
        """All that its compilation depends on, besides the function."""
        leaves, tree = jax.tree.flatten(self.args)
        shapes = [(leaf.shape, str(leaf.dtype), repr(leaf.sharding)) for leaf in leaves]
        return f"{tree} {shapes} {self.donate}"


_TPU_OPTIONS: CompilerOptions = MappingProxyType(
    {"xla_tpu_control_large_2nd_minor_layout_for_x16": False}
)
_UNKNOWN_OPTION = re.compile(r"No such compile option: '([^']+)'")


def compile_lowered(lowered: Lowered, options: CompilerOptions) -> Compiled:
    """With the options that this compiler knows; they save time or memory, no result needs them."""
    try:
        return lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        unknown = _UNKNOWN_OPTION.search(str(error))
        if unknown is None or unknown[1] not in options:
            raise
    logger.warning("this compiler does not know %s: compiled without", unknown[1])
    known = {name: value for name, value in options.items() if name != unknown[1]}
    return compile_lowered(lowered, known)


def compiler_options(platform: str, *, num_workers: int) -> CompilerOptions:
    """XLA options of a platform, for programs of which `num_workers` are compiled at a time.

    TPU: tiles of 16-bit matrices as arguments have them, also inside of loops. A TPU7x has larger
    ones otherwise, for which each prefill step copied the whole head (`docs/decisions/0016`).

    CPU: LLVM's cheaper passes. Matrix products are library calls there, and the loops in between
    run as fast (docs/benchlog.md), but a step compiles in 2/3 of the time. And no more parts of a
    program side by side than there are threads: each part costs, and the programs are parallel.
    """
    if platform == "tpu":
        return _TPU_OPTIONS
    if platform != "cpu":
        return {}
    return {
        "xla_backend_optimization_level": 1,
        "xla_cpu_parallel_codegen_split_count": min(max(num_workers, 2), 32),
    }


def _tell_nobody(names: str) -> None:
    del names


def compile_all(
    programs: Mapping[str, Program],
    options: CompilerOptions,
    *,
    num_workers: int,
    on_done: Callable[[int, int], None],
    tell: Callable[[str], None] = _tell_nobody,
    store: ProgramStore | None = None,
) -> dict[str, Compiled]:
    """Compiles in parallel, or reads from the store; `on_done(finished, total)` after each.

    `tell(names)` hears which are being compiled, from any thread. Raises what the first raised.
    """
    obtain = _Obtain(options, store, tell)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="compile") as pool:
        on_done(0, len(programs))
        futures = {pool.submit(obtain, name, program): name for name, program in programs.items()}
        compiled: dict[str, Compiled] = {}
        try:
            for future in as_completed(futures):
                compiled[futures[future]] = future.result()
                on_done(len(compiled), len(programs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            jax.monitoring.unregister_event_listener(obtain.on_event)
    return compiled


class _Obtain:
    """Reads a program from the store, or compiles and stores it; for many threads at once.

    XLA:CPU writes a broken file of an executable that was itself read from JAX's cache: its
    functions are missing, which shows when it is run. So only what JAX says it has just compiled
    and written to its own cache is stored.
    """

    def __init__(
        self, options: CompilerOptions, store: ProgramStore | None, tell: Callable[[str], None]
    ) -> None:
        self._options = options
        self._store = store
        self._tell = tell
        self._lock = threading.Lock()
        self._under_way: list[str] = []
        self._compiling = threading.local()
        jax.monitoring.register_event_listener(self.on_event)

    def on_event(self, event: str, **kwargs: str | int) -> None:
        """Of JAX, in the thread that compiles."""
        del kwargs
        if event == _CACHE_WRITE_EVENT:
            self._compiling.is_new = True

    def __call__(self, name: str, program: Program) -> Compiled:
        start_s = time.monotonic()
        self._note(name, begins=True)
        how, compiled = "read", self._load(name, program)
        if compiled is None:
            compiled = self._compile(name, program)
            is_cached = self._store is not None and not self._compiling.is_new
            how = "traced and read" if is_cached else "compiled"
        logger.info("%s %s in %.1f s", how, name, time.monotonic() - start_s)
        self._note(name, begins=False)
        return compiled

    def _load(self, name: str, program: Program) -> Compiled | None:
        if self._store is None:
            return None
        identity = self._identity(name, program)
        compiled = self._store.load(identity)
        if compiled is not None:
            self._store.note(name, identity, None)
        return compiled

    def _compile(self, name: str, program: Program) -> Compiled:
        self._compiling.is_new = False
        compiled = program.compile(self._options)
        if self._store is not None:
            identity, why_not = self._identity(name, program), _NOT_NEW
            if self._compiling.is_new:
                why_not = self._store.save(identity, compiled)
            self._store.note(name, identity, why_not)
        return compiled

    def _identity(self, name: str, program: Program) -> str:
        return f"{name} {program.describe()} {sorted(self._options.items())}"

    def _note(self, name: str, *, begins: bool) -> None:
        with self._lock:
            if begins:
                self._under_way.append(name)
            else:
                self._under_way.remove(name)
            self._tell(", ".join(self._under_way))


def enable_persistent_cache(directory: str) -> None:
    """Keeps every compiled program in `directory`; "none" switches that off.

    Raises ConfigError for a directory that cannot be written.
    """
    if directory == "none":
        return
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ConfigError(
            f"--compile-cache={directory}: cannot be written ({error.strerror}). Name another "
            "directory, or none to compile at every start."
        ) from error
    # JAX looks for a cache once, at the first compilation of the process.
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class CompileCounter:
    """Counts XLA compilations in this process, reads from the persistent cache included.

    After `mark_ready` there must be none: a request would have waited for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._count_at_ready = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == _BACKEND_COMPILE_EVENT:
            with self._lock:
                self._count += 1

    def mark_ready(self) -> None:
        """Compilations from now on are faults."""
        self._count_at_ready = self._count

    @property
    def num_after_ready(self) -> int:
        return self._count - self._count_at_ready
