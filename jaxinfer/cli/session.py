"""An engine for a command in the terminal: finds the model, starts the core process, streams.

Synchronous outside, asyncio inside: each call runs the event loop until it has its answer, so a
command may block on the keyboard in between, and Ctrl-C ends the call that runs. Knows nothing
of what is asked or printed.
"""

import asyncio
import itertools
from collections.abc import Callable
from types import TracebackType
from typing import Self

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.outputs import RequestOutput
from jaxinfer.core.progress import ProgressCallback
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.engine.client import ProcessClient
from jaxinfer.engine.model_source import LoadedModel, load_model_tokenizer
from jaxinfer.engine.progress import start_progress
from jaxinfer.tokenizer.tokenizer import Tokenizer


class Session:
    """A context manager: the engine runs inside of it.

    `check` sees the tokenizer before the engine starts, which may take minutes: what it can raise
    is known at once.
    """

    def __init__(
        self, config: EngineConfig, *, log_level: str, check: Callable[[Tokenizer], None]
    ) -> None:
        self._config = config
        self._log_level = log_level
        self._check = check
        self._runner = asyncio.Runner()
        self._request_numbers = itertools.count()
        self._engine: AsyncEngine | None = None
        self._tokenizer: Tokenizer | None = None

    def __enter__(self) -> Self:
        try:
            with start_progress(with_lines=self._log_level == "warning") as on_progress:
                model = load_model_tokenizer(self._config, on_progress)
                self._tokenizer = model.tokenizer
                self._check(model.tokenizer)
                self._runner.run(self._start(model, on_progress))
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._engine is not None:
                self._runner.run(self._engine.close())
        finally:
            self._runner.close()

    async def _start(self, model: LoadedModel, on_progress: ProgressCallback) -> None:
        # A client belongs to the event loop it is made on.
        client = ProcessClient(self._config, on_progress=on_progress, log_level=self._log_level)
        self._engine = AsyncEngine(client, model.tokenizer, model.name)
        await self._engine.start()

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "inside the context manager only"
        return self._tokenizer

    def stream(
        self, prompt: str | list[int], params: SamplingParams, on_text: Callable[[str], None]
    ) -> str:
        """Completes `prompt`; `on_text` gets each new piece. Returns the finish reason.

        Raises RequestError, EngineDeadError; KeyboardInterrupt (the request is aborted then).
        """
        return self._runner.run(self._stream(prompt, params, on_text))

    async def _stream(
        self, prompt: str | list[int], params: SamplingParams, on_text: Callable[[str], None]
    ) -> str:
        assert self._engine is not None
        request_id = f"cli-{next(self._request_numbers)}"
        outputs = self._engine.generate(prompt, params, request_id=request_id, output_kind="delta")
        finish_reason = "abort"
        async for output in outputs:
            finish_reason = _emit(output, on_text) or finish_reason
        return finish_reason


def _emit(output: RequestOutput, on_text: Callable[[str], None]) -> str | None:
    for completion in output.outputs:
        if completion.text:
            on_text(completion.text)
        if completion.finish_reason is not None:
            return completion.finish_reason
    return None
