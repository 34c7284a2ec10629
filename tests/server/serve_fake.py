"""A server process for the tests: the real one, with a device that needs no accelerator.

python -m tests.server.serve_fake MODEL_DIR FACTORY SHUTDOWN_TIMEOUT_S [STALL_TIMEOUT_S [RESTARTS]]
"""

import sys

from jaxinfer.config.schema import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    ServeConfig,
    ServerConfig,
)
from jaxinfer.logging import configure_logging
from jaxinfer.server.run import run_server


def main(
    model: str,
    factory: str,
    shutdown_timeout: str,
    stall_timeout: str = "120",
    max_restarts: str = "3",
) -> None:
    configure_logging("info", process="server")
    engine = EngineConfig(
        model=ModelConfig(model=model, max_model_len=2000),
        cache=CacheConfig(num_gpu_blocks_override=1000),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_num_queued_reqs=4),
    )
    server = ServerConfig(
        port=0,
        shutdown_timeout=float(shutdown_timeout),
        engine_stall_timeout=float(stall_timeout),
        engine_max_restarts=int(max_restarts),
    )
    run_server(
        ServeConfig(engine=engine, server=server),
        runner_factory=f"tests.engine.fake_runner:{factory}",
    )
    assert "jax" not in sys.modules, "the HTTP process must never import jax"


if __name__ == "__main__":
    main(*sys.argv[1:])
