"""The engine of a batch job: started, supervised, and spoken to as the HTTP server would.

Knows engine and server parts; nothing of files, lines or progress.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from jaxinfer.config.job import BatchConfig
from jaxinfer.config.schema import ServerConfig
from jaxinfer.core.progress import ProgressCallback
from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.engine.launch import supervised_core
from jaxinfer.engine.model_source import LoadedModel, sampling_defaults
from jaxinfer.engine.supervisor import SupervisionPolicy
from jaxinfer.server.state import ServerState


class RunningEngine(NamedTuple):
    """An engine that serves, and the state in which the server's routes find it."""

    engine: AsyncEngine
    state: ServerState


@asynccontextmanager
async def running_engine(
    config: BatchConfig, model: LoadedModel, on_progress: ProgressCallback, *, runner_factory: str
) -> AsyncIterator[RunningEngine]:
    """Serves inside of the block. Raises what keeps it from starting."""
    run = config.run
    defaults = sampling_defaults(model.tokenizer, config.engine.model)
    client = supervised_core(
        config.engine,
        SupervisionPolicy(
            stall_timeout_s=run.engine_stall_timeout, max_restarts=run.engine_max_restarts
        ),
        on_progress=on_progress,
        runner_factory=runner_factory,
        log_level=run.log_level,
    )
    engine = AsyncEngine(client, model.tokenizer, model.name)
    state = ServerState(
        ServerConfig(served_model_name=run.served_model_name, response_role=run.response_role)
    )
    try:
        await engine.start()
        state.attach(engine, sampling_defaults=defaults)
        yield RunningEngine(engine, state)
    finally:
        await engine.close()
