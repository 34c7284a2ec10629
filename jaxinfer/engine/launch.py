"""The core of an AsyncEngine: a child process under supervision.

Knows how the client and its supervisor are put together; nothing of what either does.
"""

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.progress import ProgressCallback, ignore_progress
from jaxinfer.engine.build import DEFAULT_RUNNER_FACTORY
from jaxinfer.engine.client import ProcessClient
from jaxinfer.engine.supervisor import SupervisedClient, SupervisionPolicy


def supervised_core(
    config: EngineConfig,
    policy: SupervisionPolicy,
    *,
    on_progress: ProgressCallback = ignore_progress,
    runner_factory: str = DEFAULT_RUNNER_FACTORY,
    log_level: str = "info",
) -> SupervisedClient:
    """A client whose core is started by its `start`, and again whenever it is lost.

    `runner_factory` names, as "module:function", what makes the core's runner; `on_progress` hears
    of each start. `log_level` is the core's.
    """

    def make_client() -> ProcessClient:
        return ProcessClient(
            config, on_progress=on_progress, runner_factory=runner_factory, log_level=log_level
        )

    return SupervisedClient(make_client, policy, on_progress=on_progress)
