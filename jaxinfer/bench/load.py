"""When requests are sent: at random arrivals, or as many at once as are allowed.

Arrivals are a Poisson process, or, with a burstiness other than 1, a renewal process with gamma
distributed gaps of the same mean (shape = burstiness: below 1 they come in bursts, above 1 evenly;
Feller, An Introduction to Probability Theory, vol. 2, XI). Knows clocks and clients; not what
becomes of the measurements.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp
import numpy as np

from jaxinfer.bench.client import Exchange, Prompt, Target, exchange, open_session
from jaxinfer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """`request_rate` a second (inf: all at once), never more than `max_concurrency` at a time."""

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise ConfigError(
                f"--request-rate={self.request_rate} must be more than 0 (inf: no rate)."
            )
        if not 0 < self.burstiness < math.inf:
            raise ConfigError(
                f"--burstiness={self.burstiness} must be a number more than 0 (1: Poisson)."
            )
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency={self.max_concurrency} must be at least 1.")


class LoadResult(NamedTuple):
    """All requests in the order of their arrival, and what the client itself cost."""

    exchanges: list[Exchange]
    start_s: float  # perf_counter
    client_cpu_s: float


def arrival_times(num_requests: int, shape: LoadShape) -> np.ndarray:
    """Seconds after the start at which each request is to be sent; the first comes at once."""
    if num_requests == 0 or math.isinf(shape.request_rate):
        return np.zeros(num_requests)
    rng = np.random.default_rng(shape.seed)
    scale_s = 1.0 / (shape.request_rate * shape.burstiness)
    gaps_s = rng.gamma(shape.burstiness, scale_s, num_requests - 1)
    return np.concatenate([[0.0], np.cumsum(gaps_s)])


async def run_load(
    target: Target, prompts: Sequence[Prompt], shape: LoadShape, *, num_warmups: int = 0
) -> LoadResult:
    """Sends all prompts and waits for all answers.

    The first `num_warmups` of them are sent before the clock starts, under the same limit, and are
    in no result; their connections are used again.
    """
    async with open_session() as session:
        slots = _slots(shape)
        await asyncio.gather(
            *(_send(session, target, prompt, slots, 0.0) for prompt in prompts[:num_warmups])
        )
        measured = prompts[num_warmups:]
        delays_s = arrival_times(len(measured), shape)
        cpu_s, start_s = time.process_time(), time.perf_counter()
        tasks = []
        for prompt, delay_s in zip(measured, delays_s.tolist(), strict=True):
            planned_s = start_s + delay_s
            wait_s = planned_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(_send(session, target, prompt, slots, planned_s)))
        exchanges = await asyncio.gather(*tasks)
        return LoadResult(exchanges, start_s, time.process_time() - cpu_s)


def _slots(shape: LoadShape) -> contextlib.AbstractAsyncContextManager[None]:
    if shape.max_concurrency is None:
        return contextlib.nullcontext()
    return asyncio.Semaphore(shape.max_concurrency)


async def _send(
    session: aiohttp.ClientSession,
    target: Target,
    prompt: Prompt,
    slots: contextlib.AbstractAsyncContextManager[None],
    planned_s: float,
) -> Exchange:
    async with slots:
        return await exchange(session, target, prompt, planned_s=planned_s)
