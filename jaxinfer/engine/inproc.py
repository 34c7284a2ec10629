"""An engine core in the caller's own process and thread, for `LLM`.

The same messages as over the wire, as objects: no encoding, no thread, no polling. `step` makes
one turn of the core; while the host handles its news the device already runs the next step.
Importing this module imports no JAX; making an InProcessClient does.
"""

from collections.abc import Callable

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.messages import (
    AbortRequests,
    AddRequest,
    CoreMessage,
    EngineInfo,
    ResetPrefixCache,
)
from jaxinfer.core.progress import ProgressCallback, ignore_progress
from jaxinfer.engine.build import DEFAULT_RUNNER_FACTORY, build_core
from jaxinfer.errors import EngineDeadError, JaxInferError

_ME = 0  # the only client


class InProcessClient:
    """Builds the core (minutes, perhaps) and steps it by hand. Not thread-safe."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: ProgressCallback = ignore_progress,
        runner_factory: str = DEFAULT_RUNNER_FACTORY,
    ) -> None:
        self._sent: list[CoreMessage] = []
        self._built = build_core(
            config,
            runner_factory=runner_factory,
            progress=on_progress,
            send=lambda _, message: self._sent.append(message),
            num_clients=1,
        )
        self._is_alive = True

    @property
    def info(self) -> EngineInfo:
        return self._built.info

    @property
    def is_alive(self) -> bool:
        return self._is_alive

    @property
    def has_work(self) -> bool:
        return self._is_alive and self._built.core.has_work

    def add(self, request: AddRequest) -> None:
        self._handle(request)

    def abort(self, request_ids: list[str]) -> None:
        self._handle(AbortRequests(request_ids=request_ids))

    def reset_prefix_cache(self) -> None:
        self._handle(ResetPrefixCache())

    def step(self) -> list[CoreMessage]:
        """One turn; what the core has to say since the last one. Raises EngineDeadError."""
        self._run(self._built.core.step)
        messages, self._sent = self._sent, []
        return messages

    def close(self) -> None:
        """Gives the device back. Idempotent."""
        if self._is_alive:
            self._is_alive = False
            self._built.runner.close()

    def _handle(self, message: AddRequest | AbortRequests | ResetPrefixCache) -> None:
        self._run(lambda: self._built.core.handle(_ME, message))

    def _run(self, action: Callable[[], None]) -> None:
        """Whatever breaks inside the core leaves it in an unknown state: it is dead then."""
        if not self._is_alive:
            raise EngineDeadError("The engine is closed.")
        try:
            action()
        except JaxInferError:
            self.close()
            raise
        except Exception as error:  # the boundary of the engine
            self.close()
            raise EngineDeadError(
                f"The engine core failed: {type(error).__name__}: {error}"
            ) from error
