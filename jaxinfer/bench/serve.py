"""`bench serve`: the figures of an OpenAI-style server under load. Knows no engine, prints nothing.

Everything is measured in this process, on one clock (`time.perf_counter`). A request's time to
first token runs from when it is sent, which with a limit on concurrency may be later than planned;
that wait is a figure of its own. Failed requests are in no distribution: they are counted by cause.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import aiohttp
import msgspec
import numpy as np

from jaxinfer.bench.client import Exchange, Target, open_session
from jaxinfer.bench.load import LoadResult, LoadShape, run_load
from jaxinfer.bench.prompts import PromptSource, load_prompts
from jaxinfer.bench.stats import Distribution, distribution
from jaxinfer.errors import ConfigError


class ServeReport(msgspec.Struct, frozen=True, kw_only=True):
    """One level of load; times in seconds."""

    base_url: str
    endpoint: str
    model: str
    request_rate: float | None  # None: no rate
    burstiness: float
    max_concurrency: int | None
    num_prompts: int
    num_warmups: int  # sent before, and in none of the figures
    num_ok: int
    errors: dict[str, int]  # what went wrong -> how many requests
    duration_s: float  # first request sent to last answer's end
    request_per_s: float
    output_tok_s: float
    total_tok_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    are_tokens_counted_by_server: bool  # False: frames were counted
    tokens_per_frame: float  # above 1: several tokens came at once, and gaps are between those
    ttft_s: Distribution | None
    itl_s: Distribution | None  # gaps between the frames of a stream, all streams together
    tpot_s: Distribution | None  # per request: mean time per token after the first
    e2e_s: Distribution | None
    client_wait_s: Distribution | None  # sent later than planned; None without a request rate
    client_cpu_s_per_token: float  # what this client itself cost
    client_cpu_share: float  # of one core

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())


class ServeRun(NamedTuple):
    report: ServeReport
    result: LoadResult


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What is sent, and in how many levels of concurrency (None: no limit)."""

    source: PromptSource
    shape: LoadShape
    num_prompts: int
    num_warmups: int
    concurrencies: tuple[int | None, ...]


async def _first_model(base_url: str, headers: dict[str, str]) -> str:
    async with (
        open_session() as session,
        session.get(base_url + "/v1/models", headers=headers) as r,
    ):
        text = await r.text()
        if r.status != 200:
            raise ConfigError(
                f"{base_url}/v1/models answers {r.status}: {text[:200]} (a key is given with "
                "--api-key, a model with --model)."
            )
    try:
        return str(msgspec.json.decode(text)["data"][0]["id"])
    except (msgspec.MsgspecError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{base_url}/v1/models names no model: {text[:200]} Give --model NAME."
        ) from error


def find_model(target: Target) -> Target:
    """The target with the first model that the server says it has."""
    try:
        return target.of(asyncio.run(_first_model(target.base_url, target.headers)))
    except (aiohttp.ClientError, OSError) as error:
        raise ConfigError(
            f"--base-url={target.base_url}: no server answers there ({error}). Start one, or leave "
            "--base-url out to have one started."
        ) from error


def measure_level(target: Target, settings: ServeSettings, level: int) -> ServeRun:
    """One run at the level's concurrency, with prompts of its own."""
    shape = replace(settings.shape, max_concurrency=settings.concurrencies[level])
    count = settings.num_warmups + settings.num_prompts
    prompts = load_prompts(settings.source, count, target.endpoint, salt=level)
    result = asyncio.run(run_load(target, prompts, shape, num_warmups=settings.num_warmups))
    return ServeRun(report_of(target, settings, shape, result), result)


def report_of(
    target: Target, settings: ServeSettings, shape: LoadShape, result: LoadResult
) -> ServeReport:
    done = [exchange for exchange in result.exchanges if exchange.error is None]
    failures = Counter(exchange.error for exchange in result.exchanges if exchange.error)
    duration_s = max((one.end_s for one in result.exchanges), default=0.0) - result.start_s
    num_output = sum(exchange.num_output_tokens for exchange in done)
    num_prompt = sum(exchange.num_prompt_tokens for exchange in done)
    num_frames = sum(len(exchange.token_times_s) for exchange in done)
    return ServeReport(
        base_url=target.base_url,
        endpoint=target.endpoint,
        model=target.model,
        request_rate=None if np.isinf(shape.request_rate) else shape.request_rate,
        burstiness=shape.burstiness,
        max_concurrency=shape.max_concurrency,
        num_prompts=settings.num_prompts,
        num_warmups=settings.num_warmups,
        num_ok=len(done),
        errors=dict(failures.most_common()),
        duration_s=duration_s,
        request_per_s=len(done) / duration_s,
        output_tok_s=num_output / duration_s,
        total_tok_s=(num_output + num_prompt) / duration_s,
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        are_tokens_counted_by_server=all(exchange.is_counted for exchange in done),
        tokens_per_frame=num_output / num_frames if num_frames else 0.0,
        client_cpu_s_per_token=result.client_cpu_s / max(1, num_output),
        client_cpu_share=result.client_cpu_s / duration_s,
        client_wait_s=None if np.isinf(shape.request_rate) else _waits(done),
        **_distributions(done),
    )


def inter_token_s(exchanges: list[Exchange]) -> np.ndarray:
    """All gaps between the frames of each stream."""
    gaps = [np.diff(exchange.token_times_s) for exchange in exchanges]
    return np.concatenate(gaps) if gaps else np.zeros(0)


def _waits(done: list[Exchange]) -> Distribution | None:
    return distribution([exchange.sent_s - exchange.planned_s for exchange in done])


def _distributions(done: list[Exchange]) -> dict[str, Any]:
    return {
        "ttft_s": distribution([exchange.ttft_s for exchange in done]),
        "itl_s": distribution(inter_token_s(done)),
        "tpot_s": distribution([one.tpot_s for one in done if one.tpot_s is not None]),
        "e2e_s": distribution([exchange.e2e_s for exchange in done]),
    }
