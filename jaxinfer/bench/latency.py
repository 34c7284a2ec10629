"""`bench latency`: one batch at a time through the offline engine, every token timed.

A token's time is when the engine's news of it reach the caller's thread, on the one clock that the
batch's start is read from too. Knows engines; prints nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from jaxinfer.bench.stats import Distribution, distribution
from jaxinfer.bench.workloads import Workload, check_fits, random_prompts
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.messages import CoreMessage, EngineInfo, StepUpdate
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.inproc import InProcessClient
from jaxinfer.engine.model_source import load_model_tokenizer
from jaxinfer.engine.offline import LLM
from jaxinfer.engine.progress import start_progress


class ClockedClient(InProcessClient):
    """Notes when each sequence's tokens come, one time a token (those of one message share it)."""

    token_times_s: dict[str, list[float]]

    def begin(self) -> None:
        """Forgets all times."""
        self.token_times_s = {}

    def step(self) -> list[CoreMessage]:
        messages = super().step()
        now_s = time.perf_counter()
        for message in messages:
            if isinstance(message, StepUpdate):
                for news in message.sequences:
                    times = self.token_times_s.setdefault(news.request_id, [])
                    times += [now_s] * len(news.new_token_ids)
        return messages


class BatchTimes(NamedTuple):
    """One batch. All in seconds."""

    e2e_s: float
    ttft_s: list[float]  # one a sequence
    itl_s: list[float]  # one a token but the first of each sequence


class LatencyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench latency` found; times in seconds."""

    model: str
    dtype: str
    device: str
    batch_size: int
    input_len: int
    output_len: int
    num_iters: int
    num_iters_warmup: int
    startup_s: float
    e2e_s: Distribution  # first prompt in to last token of the batch out
    ttft_s: Distribution
    itl_s: Distribution | None  # None when one token a sequence is asked for
    output_tok_s: float


class LatencyRun(NamedTuple):
    report: LatencyReport
    batches: list[BatchTimes]


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    workload: Workload
    num_iters: int
    num_iters_warmup: int
    seed: int


def batch_times(start_s: float, end_s: float, token_times_s: list[list[float]]) -> BatchTimes:
    return BatchTimes(
        e2e_s=end_s - start_s,
        ttft_s=[times[0] - start_s for times in token_times_s],
        itl_s=[gap for times in token_times_s for gap in np.diff(times).tolist()],
    )


def measure_latency(config: EngineConfig, settings: LatencySettings) -> LatencyRun:
    """Starts an engine and runs the batches one after the other."""
    check_fits(settings.workload, config.model.max_model_len)
    start_s = time.perf_counter()
    with start_progress() as on_progress:
        loaded = load_model_tokenizer(config, on_progress)
        client = ClockedClient(config, on_progress=on_progress)
    with LLM.from_parts(client, loaded.tokenizer, seed=config.model.seed) as llm:
        check_fits(settings.workload, llm.info.max_model_len)
        startup_s = time.perf_counter() - start_s
        batches = list(_batches(llm, client, settings))[settings.num_iters_warmup :]
        info = llm.info
    return LatencyRun(_report(batches, info, settings, startup_s), batches)


def _batches(llm: LLM, client: ClockedClient, settings: LatencySettings) -> Iterator[BatchTimes]:
    workload = settings.workload
    params = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True)
    for iteration in range(settings.num_iters_warmup + settings.num_iters):
        # Other prompts each time: the prefix cache would know those of the batch before.
        prompts: list[Any] = random_prompts(
            workload.num_prompts,
            workload.input_len,
            vocab_size=llm.get_tokenizer().vocab_size,
            seed=settings.seed + iteration,
        )
        client.begin()
        start_s = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        end_s = time.perf_counter()
        times = list(client.token_times_s.values())
        assert len(times) == workload.num_prompts, "a sequence had no tokens"
        assert all(len(one) == workload.output_len for one in times), "an answer fell short"
        yield batch_times(start_s, end_s, times)


def _report(
    batches: list[BatchTimes], info: EngineInfo, settings: LatencySettings, startup_s: float
) -> LatencyReport:
    workload = settings.workload
    e2e_s = distribution([batch.e2e_s for batch in batches])
    ttft_s = distribution([value for batch in batches for value in batch.ttft_s])
    assert e2e_s is not None, "at least one batch is measured"
    assert ttft_s is not None, "each has a first token"
    return LatencyReport(
        model=info.model,
        dtype=info.dtype,
        device=info.device,
        batch_size=workload.num_prompts,
        input_len=workload.input_len,
        output_len=workload.output_len,
        num_iters=settings.num_iters,
        num_iters_warmup=settings.num_iters_warmup,
        startup_s=startup_s,
        e2e_s=e2e_s,
        ttft_s=ttft_s,
        itl_s=distribution([value for batch in batches for value in batch.itl_s]),
        output_tok_s=workload.num_prompts * workload.output_len / e2e_s.mean,
    )
