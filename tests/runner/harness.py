"""A real EngineCore over a real Runner, stepped by hand; many engines may follow on one runner."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxinfer.core.messages import (
    AbortRequests,
    AddRequest,
    CoreMessage,
    EngineInfo,
    EngineStats,
    SequenceUpdate,
    StepUpdate,
)
from jaxinfer.core.sampling_params import MAX_LOGPROBS, SamplingParams
from jaxinfer.core.step import TokenLogprobs
from jaxinfer.engine.core import EngineCore
from jaxinfer.runner.runner import Runner
from jaxinfer.scheduler.limits import SchedulerLimits
from jaxinfer.scheduler.scheduler import Scheduler

_ME = 0


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How an engine is driven; the outputs must not depend on it."""

    is_async: bool = True
    prefix_caching: bool = True
    num_pages: int | None = None  # fewer than the runner has
    long_prefill_token_threshold: int = 0


@dataclass(kw_only=True)
class Collected:
    """All that came out for one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    def add(self, update: SequenceUpdate) -> None:
        assert self.finish_reason is None, "news of a finished request"
        self.token_ids += update.new_token_ids
        self.logprobs += update.logprobs or []
        self.prompt_logprobs += update.prompt_logprobs or []
        self.finish_reason = update.finish_reason
        self.stop_reason = update.stop_reason
        self.num_cached_tokens = update.num_cached_tokens
        self.error = update.error


class Engine:
    """Checks the scheduler's integrity after each step."""

    def __init__(self, runner: Runner, mode: Mode | None = None) -> None:
        mode = mode or Mode()
        limits = runner.limits
        num_pages = mode.num_pages or limits.num_pages
        self._scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_model_len=limits.max_model_len,
                page_size=limits.page_size,
                num_pages=num_pages,
                long_prefill_token_threshold=mode.long_prefill_token_threshold,
                enable_prefix_caching=mode.prefix_caching,
            )
        )
        info = EngineInfo(
            model="tiny",
            max_model_len=limits.max_model_len,
            vocab_size=runner.vocab_size,
            num_pages=num_pages,
            page_size=limits.page_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            eos_token_ids=list(runner.eos_token_ids),
            max_logprobs=MAX_LOGPROBS,
            enable_prefix_caching=mode.prefix_caching,
            scheduling_policy="fcfs",
            dtype=runner.dtype,
            device=runner.device_name,
        )
        self._core = EngineCore(
            runner=runner,
            scheduler=self._scheduler,
            info=info,
            send=self._receive,
            num_clients=1,
            async_scheduling=mode.is_async,
        )
        self.outputs: dict[str, Collected] = {}
        self.stats = EngineStats()

    def add(self, name: str, prompt: list[int], sampling: SamplingParams) -> None:
        self.outputs[name] = Collected()
        self._core.handle(
            _ME,
            AddRequest(
                request_id=name,
                prompt_token_ids=prompt,
                sampling=sampling,
                arrival_time_s=0.0,
            ),
        )

    def abort(self, names: Iterable[str]) -> None:
        self._core.handle(_ME, AbortRequests(request_ids=list(names)))

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    def step(self) -> None:
        self._core.step()
        self._scheduler.check_integrity()

    def finish(self) -> None:
        while self._core.has_work:
            self.step()

    def run(self, prompt: list[int], sampling: SamplingParams) -> Collected:
        """One request on its own."""
        name = f"alone-{len(self.outputs)}"
        self.add(name, prompt, sampling)
        self.finish()
        return self.outputs[name]

    def _receive(self, client_index: int, message: CoreMessage) -> None:
        assert client_index == _ME
        assert isinstance(message, StepUpdate), message
        self.stats = message.stats
        for update in message.sequences:
            self.outputs[update.request_id].add(update)
