"""Compiles every program the runner will call, before the engine is ready, and watches for more.

Programs are compiled ahead of time in a thread pool (XLA releases the GIL) and kept in a
persistent cache, so a second start only reads them. Knows functions and shapes, no model.
"""

import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.stages import Compiled

from jaxinfer.errors import ConfigError

_BACKEND_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


CompilerOptions = Mapping[str, Any]


class Program(NamedTuple):
    """A function and the abstract arguments it is compiled for."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct with shardings
    donate: tuple[int, ...]

    def compile(self, options: CompilerOptions) -> Compiled:
        lowered = jax.jit(self.function, donate_argnums=self.donate).lower(*self.args)
        return lowered.compile(compiler_options=dict(options))


def compiler_options(platform: str) -> CompilerOptions:
    """XLA options of a platform.

    CPU: LLVM's cheaper passes. Matrix products are library calls there, and the loops in between
    run as fast (docs/benchlog.md), but a step compiles in 2/3 of the time.
    """
    return {"xla_backend_optimization_level": 1} if platform == "cpu" else {}


def compile_all(
    programs: Mapping[str, Program],
    options: CompilerOptions,
    *,
    num_workers: int,
    on_done: Callable[[int, int], None],
) -> dict[str, Compiled]:
    """Compiles in parallel; `on_done(finished, total)` after each. Raises what the first raised."""
    with ThreadPoolExecutor(num_workers, thread_name_prefix="compile") as pool:
        on_done(0, len(programs))
        futures = {
            pool.submit(program.compile, options): name for name, program in programs.items()
        }
        compiled: dict[str, Compiled] = {}
        try:
            for future in as_completed(futures):
                compiled[futures[future]] = future.result()
                on_done(len(compiled), len(programs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return compiled


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
