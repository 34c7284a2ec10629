"""Puts an EngineCore together from its configuration.

The runner comes from an importable factory named by a string, so that this module (and with it
the engine's client side) imports no JAX until a core is really built.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.messages import CoreMessage, EngineInfo
from jaxinfer.core.progress import ProgressCallback
from jaxinfer.core.sampling_params import MAX_LOGPROBS
from jaxinfer.engine.core import EngineCore, Runner
from jaxinfer.scheduler.limits import SchedulerLimits
from jaxinfer.scheduler.scheduler import Scheduler

DEFAULT_RUNNER_FACTORY = "jaxinfer.runner.build:build_runner"


RunnerFactory = Callable[[EngineConfig, ProgressCallback], Runner]


class BuiltCore(NamedTuple):
    core: EngineCore
    info: EngineInfo
    runner: Runner
    scheduler: Scheduler


def load_factory(path: str) -> RunnerFactory:
    """The callable named by "package.module:function"."""
    module_name, _, function_name = path.partition(":")
    return getattr(importlib.import_module(module_name), function_name)


def build_core(
    config: EngineConfig,
    *,
    runner_factory: str,
    progress: ProgressCallback,
    send: Callable[[int, CoreMessage], None],
    num_clients: int,
) -> BuiltCore:
    """Loads and compiles everything; may take minutes. Raises what the runner raises."""
    runner = load_factory(runner_factory)(config, progress)
    limits = runner.limits
    scheduling = config.scheduler
    scheduler = Scheduler(
        SchedulerLimits(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            page_size=limits.page_size,
            num_pages=limits.num_pages,
            policy=scheduling.scheduling_policy,
            max_num_queued=scheduling.max_num_queued_reqs,
            long_prefill_token_threshold=scheduling.long_prefill_token_threshold,
            enable_prefix_caching=config.cache.enable_prefix_caching,
        )
    )
    info = EngineInfo(
        model=config.model.model,
        max_model_len=limits.max_model_len,
        vocab_size=runner.vocab_size,
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        eos_token_ids=list(runner.eos_token_ids),
        max_logprobs=MAX_LOGPROBS,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        scheduling_policy=scheduling.scheduling_policy,
        dtype=runner.dtype,
        device=runner.device_name,
    )
    core = EngineCore(
        runner=runner,
        scheduler=scheduler,
        info=info,
        send=send,
        num_clients=num_clients,
        async_scheduling=scheduling.async_scheduling,
    )
    return BuiltCore(core, info, runner, scheduler)
