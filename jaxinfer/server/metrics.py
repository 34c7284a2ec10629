"""Prometheus metrics under vLLM's names and bucket edges, with a configurable prefix.

Times come from the engine's hooks: a slow reader of a stream does not look like a slow engine.
Engine gauges are read from the last snapshot at scrape time: a scrape sends nothing to the engine.
Knows no HTTP.
"""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxinfer.core.messages import EngineInfo, EngineStats
from jaxinfer.core.outputs import RequestMetrics
from jaxinfer.core.request import FinishReason
from jaxinfer.engine.request_state import FinishedEvent, TokensEvent
from jaxinfer.server.token_metrics import TokenCounter, TokenHistogram


def _edges(text: str) -> tuple[float, ...]:
    return tuple(float(edge) for edge in text.split())


_LATENCY_S = _edges("0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
_TTFT_S = _edges(
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
)
_ITL_S = _edges("0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80")
_HTTP_S = _edges("0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 60 120")
_CHOICES = (1, 2, 5, 10, 20)
_STEP_TOKENS = (1, *(2**power for power in range(3, 15)))
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _token_buckets(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    steps = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    return [step for step in steps if step <= limit]


class HttpMetrics:
    """Counts HTTP requests; exists before there is an engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests",
            "HTTP requests by route, method and status.",
            ("handler", "method", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Time to the end of the response.",
            ("handler", "method"),
            buckets=_HTTP_S,
            registry=registry,
        )

    def observe(self, *, handler: str, method: str, status: int, seconds: float) -> None:
        # A client chooses the method's name: unknown ones must not grow the label set.
        method = method if method in _METHODS else "other"
        self._requests.labels(handler, method, str(status)).inc()
        self._seconds.labels(handler, method).observe(seconds)


class _Families:
    """Makes metrics that carry the prefix and the model's name."""

    def __init__(self, registry: CollectorRegistry, *, prefix: str, model_name: str) -> None:
        self._registry = registry
        self._prefix = prefix
        self._model_name = model_name

    def histogram(self, name: str, text: str, edges: Sequence[float]) -> TokenHistogram:
        family = TokenHistogram(
            f"{self._prefix}:{name}", text, model_name=self._model_name, edges=edges
        )
        self._registry.register(family)
        return family

    def counter(self, name: str, text: str) -> Counter:
        name = f"{self._prefix}:{name}"
        return Counter(name, text, ("model_name",), registry=self._registry).labels(
            self._model_name
        )

    def finished(self) -> dict[str, Counter]:
        """A counter for each way to end."""
        family = Counter(
            f"{self._prefix}:request_success",
            "Completions ended, by reason; abort counts clients that went away.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        return {
            reason.value: family.labels(self._model_name, reason.value) for reason in FinishReason
        }


class EngineMetrics:
    """Everything labelled with the model's name."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        prefix: str,
        model_name: str,
        info: EngineInfo,
        stats: Callable[[], EngineStats],
    ) -> None:
        families = _Families(registry, prefix=prefix, model_name=model_name)
        histogram, counter = families.histogram, families.counter
        tokens = _token_buckets(info.max_model_len)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self._cached_tokens = counter(
            "prompt_tokens_cached", "Prompt tokens of requests that ended, found in the cache."
        )
        self._generation_tokens = TokenCounter(
            f"{prefix}:generation_tokens", "Tokens generated.", model_name=model_name
        )
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_S)
        self._itl = histogram("inter_token_latency_seconds", "Token to next token.", _ITL_S)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean of a request's token times.", _ITL_S
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to the end.", _LATENCY_S)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first step.", _LATENCY_S)
        self._prefill = histogram(
            "request_prefill_time_seconds", "First step to first token.", _LATENCY_S
        )
        self._decode = histogram(
            "request_decode_time_seconds", "First token to last token.", _LATENCY_S
        )
        self._inference = histogram(
            "request_inference_time_seconds", "First step to last token.", _LATENCY_S
        )
        self._request_prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", tokens)
        self._request_output = histogram(
            "request_generation_tokens", "Tokens generated for a request.", tokens
        )
        self._request_longest = histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest choice.", tokens
        )
        self._params_n = histogram("request_params_n", "n of a request.", _CHOICES)
        self._params_max = histogram(
            "request_params_max_tokens", "max_tokens of a request.", tokens
        )
        self._step_tokens = histogram(
            "iteration_tokens_total", "Tokens that a step computes.", _STEP_TOKENS
        )
        self._finished = families.finished()
        registry.register(self._generation_tokens)
        registry.register(_EngineCollector(prefix, model_name, info, stats))

    def on_step(self, num_tokens: int) -> None:
        """The engine's hook: a step has ended."""
        self._step_tokens.observe(num_tokens)

    def on_tokens(self, event: TokensEvent) -> None:
        """The engine's hook: called for every sequence of every step, so it must stay cheap."""
        self._generation_tokens.inc(event.num_tokens)
        if event.is_first:
            self._ttft.observe(event.latency_s)
        else:
            self._itl.observe(event.latency_s / event.num_tokens, event.num_tokens)

    def on_finished(self, event: FinishedEvent) -> None:
        """The engine's hook: a request has ended, or its client has gone."""
        self._prompt_tokens.inc(event.num_prompt_tokens)
        self._cached_tokens.inc(event.num_cached_tokens)
        self._request_prompt.observe(event.num_prompt_tokens)
        self._request_output.observe(event.num_output_tokens)
        self._request_longest.observe(event.longest_output_tokens)
        self._params_n.observe(event.params.n)
        if event.params.max_tokens is not None:
            self._params_max.observe(event.params.max_tokens)
        for reason in event.finish_reasons:
            # A sequence without a reason is one whose engine died.
            self._finished[reason or FinishReason.ERROR.value].inc()
        self._observe_times(event.metrics, event.num_output_tokens)

    def _observe_times(self, times: RequestMetrics, num_tokens: int) -> None:
        if times.finished_time_s is not None:
            self._e2e.observe(times.finished_time_s - times.arrival_time_s)
        if times.queue_time_s is None:
            return
        self._queue.observe(times.queue_time_s)
        if times.first_token_time_s is None or times.last_token_time_s is None:
            return
        started_s = times.arrival_time_s + times.queue_time_s
        decode_s = times.last_token_time_s - times.first_token_time_s
        self._prefill.observe(max(0.0, times.first_token_time_s - started_s))
        self._decode.observe(decode_s)
        self._inference.observe(max(0.0, times.last_token_time_s - started_s))
        if num_tokens > 1:
            self._tpot.observe(decode_s / (num_tokens - 1))


class Metrics:
    """The registry and what is in it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self.http = HttpMetrics(self._registry)

    def engine(
        self, *, prefix: str, model_name: str, info: EngineInfo, stats: Callable[[], EngineStats]
    ) -> EngineMetrics:
        return EngineMetrics(
            self._registry, prefix=prefix, model_name=model_name, info=info, stats=stats
        )

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Turns the engine's last snapshot into metrics when asked."""

    def __init__(
        self, prefix: str, model_name: str, info: EngineInfo, stats: Callable[[], EngineStats]
    ) -> None:
        self._prefix = prefix
        self._model_name = model_name
        self._info = info
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        gauges = (
            ("num_requests_running", "Requests in the batch.", stats.num_running),
            ("num_requests_waiting", "Requests in the queue.", stats.num_waiting),
            ("kv_cache_usage_perc", "KV pages in use, 0 to 1.", stats.kv_usage),
        )
        counters = (
            ("engine_steps", "Steps taken.", stats.num_steps_total),
            ("prefix_cache_queries", "Tokens looked up.", stats.prefix_queries_total),
            ("prefix_cache_hits", "Tokens found.", stats.prefix_hits_total),
            ("num_preemptions", "Requests preempted.", stats.num_preemptions_total),
            ("compiles_after_ready", "Must stay 0.", stats.num_compiles_after_ready),
            ("engine_restarts", "Cores started in place of one lost.", stats.num_restarts_total),
            ("failed_steps", "Steps that broke and ran again.", stats.num_failed_steps_total),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=("model_name",))
            gauge.add_metric((self._model_name,), value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=("model_name",))
            counter.add_metric((self._model_name,), value)
            yield counter
        yield self._cache_config()

    def _cache_config(self) -> Metric:
        info = self._info
        labels = {
            "model_name": self._model_name,
            "block_size": str(info.page_size),
            "num_gpu_blocks": str(info.num_pages),
            "enable_prefix_caching": str(info.enable_prefix_caching),
        }
        family = GaugeMetricFamily(
            f"{self._prefix}:cache_config_info", "The KV cache.", labels=tuple(labels)
        )
        family.add_metric(tuple(labels.values()), 1)
        return family
