"""The cheap counters must look to Prometheus as prometheus_client's own do."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from jaxinfer.server.token_metrics import TokenCounter, TokenHistogram

EDGES = (0.01, 0.5, 1.0, 20.0)
VALUES = (0.0, 0.01, 0.010001, 0.5, 3.0, 20.0, 21.0, 1e6)


def samples(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def test_same_exposition() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counter = TokenCounter("x:tokens", "Tokens.", model_name="m")
    histogram = TokenHistogram("x:seconds", "Seconds.", model_name="m", edges=EDGES)
    ours.register(counter)
    ours.register(histogram)
    labels = ("model_name",)
    their_counter = Counter("x:tokens", "Tokens.", labels, registry=theirs).labels("m")
    their_histogram = Histogram("x:seconds", "Seconds.", labels, buckets=EDGES, registry=theirs)
    their_histogram.labels("m")
    assert samples(ours) == samples(theirs)
    for value in VALUES:
        counter.inc(3)
        their_counter.inc(3)
        histogram.observe(value)
        their_histogram.labels("m").observe(value)
    histogram.observe(0.25, 4)
    for _ in range(4):
        their_histogram.labels("m").observe(0.25)
    assert samples(ours) == samples(theirs)
