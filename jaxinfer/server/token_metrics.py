"""Metrics that are counted for every token: plain numbers, turned into metrics when scraped.

prometheus_client's own types take a lock and several checks for each number, some microseconds a
token. These are for one thread, the event loop's. Knows no requests.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenCounter(Collector):
    """A counter labelled with the model's name."""

    def __init__(self, name: str, text: str, *, model_name: str) -> None:
        self._name = name
        self._text = text
        self._labels = (model_name,)
        self._count = 0

    def inc(self, count: int) -> None:
        self._count += count

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=("model_name",))
        family.add_metric(self._labels, self._count)
        yield family


class TokenHistogram(Collector):
    """A histogram labelled with the model's name; `edges` ascend, and belong to what is below."""

    def __init__(self, name: str, text: str, *, model_name: str, edges: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._labels = (model_name,)
        self._edges = tuple(edges)
        self._counts = [0] * (len(self._edges) + 1)  # not cumulative; the last is above all edges
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._edges, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        names = [*map(floatToGoString, self._edges), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(self._name, self._text, labels=("model_name",))
        family.add_metric(self._labels, buckets=buckets, sum_value=self._sum)
        yield family
