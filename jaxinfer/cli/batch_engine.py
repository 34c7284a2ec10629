"""The engine of a batch job: started, supervised, and spoken to as the HTTP server would.

Knows engine and server parts; nothing of files, lines or progress.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from jaxinfer.config.job import BatchConfig, RunConfig
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


_LONGEST_DELAY_S = 5.0


def _policy(run: RunConfig) -> SupervisionPolicy:
    """Restarts without end, or none at all.

    Whether they lead anywhere shows in answers, which the pump counts: a few lines that lose the
    engine each time must not use up a budget, and it waits only so long for a core that cannot
    be started.
    """
    return SupervisionPolicy(
        stall_timeout_s=run.engine_stall_timeout,
        max_restarts=None if run.engine_max_restarts > 0 else 0,
        longest_delay_s=_LONGEST_DELAY_S,
    )


@asynccontextmanager
async def running_engine(
    config: BatchConfig, model: LoadedModel, on_progress: ProgressCallback, *, runner_factory: str
) -> AsyncIterator[RunningEngine]:
    """Serves inside of the block. Raises what keeps it from starting."""
    run = config.run
    defaults = sampling_defaults(model.tokenizer, config.engine.model)
    client = supervised_core(
        config.engine,
        _policy(run),
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
        state.attach(
            engine,
            sampling_defaults=defaults,
            max_num_queued=config.engine.scheduler.max_num_queued_reqs,
        )
        yield RunningEngine(engine, state)
    finally:
        await engine.close()
