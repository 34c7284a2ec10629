"""From exchanges and times to figures: the arithmetic, the tables, the plots."""

import sys
from pathlib import Path

import pytest

from jaxinfer.bench.client import Exchange, Target
from jaxinfer.bench.latency import batch_times
from jaxinfer.bench.load import LoadResult, LoadShape
from jaxinfer.bench.plots import check_can_plot, plot_serve, plot_throughput
from jaxinfer.bench.prompts import PromptSource
from jaxinfer.bench.serve import ServeReport, ServeRun, ServeSettings, report_of
from jaxinfer.bench.stats import aligned, cumulative, distribution, rate_over_time
from jaxinfer.bench.tables import serve_table
from jaxinfer.errors import ConfigError

TARGET = Target(base_url="http://h", endpoint="/v1/completions", model="m")


def made(sent_s: float, times_s: list[float], *, tokens: int = 0, error: str | None = None):
    return Exchange(
        planned_s=sent_s - 0.5,
        sent_s=sent_s,
        end_s=times_s[-1] if times_s else sent_s + 1,
        token_times_s=times_s,
        num_prompt_tokens=10,
        num_output_tokens=tokens or len(times_s),
        is_counted=True,
        error=error,
    )


def report(exchanges: list[Exchange], **shape: float) -> ServeReport:
    source = PromptSource(
        dataset="random", path=None, input_len=1, output_len=1, vocab_size=9, seed=0
    )
    load = LoadShape(**{"max_concurrency": 2, **shape})
    settings = ServeSettings(
        source=source,
        shape=load,
        num_prompts=len(exchanges),
        num_warmups=3,
        concurrencies=(load.max_concurrency,),
    )
    return report_of(TARGET, settings, load, LoadResult(exchanges, 100.0, 0.5))


TWO = [made(100.0, [101.0, 101.5, 102.0]), made(100.0, [103.0, 104.0], tokens=3)]


def test_distribution():
    sample = distribution([float(number) for number in range(101, 0, -1)])
    assert sample is not None
    assert (sample.count, sample.min, sample.p50, sample.p90, sample.p99, sample.max) == (
        101, 1.0, 51.0, 91.0, 100.0, 101.0,
    )  # fmt: skip
    assert sample.mean == 51.0
    assert distribution([]) is None


def test_cumulative_and_rates():
    x, y = cumulative([3.0, 1.0, 2.0, 2.0])
    assert (x.tolist(), y.tolist()) == ([1.0, 2.0, 2.0, 3.0], [0.25, 0.5, 0.75, 1.0])
    assert rate_over_time([0.1, 0.2, 1.1], 0.5).tolist() == [4.0, 0.0, 2.0]
    assert rate_over_time([], 0.5).tolist() == []


def test_aligned():
    assert aligned([["a", "10"], ["bcd", "2"]]) == ["a    10", "bcd   2"]


def test_report_of_a_level():
    found = report(TWO)
    assert (found.num_ok, found.num_errors, found.duration_s) == (2, 0, 4.0)
    assert found.output_tok_s == 6 / 4
    assert found.total_tok_s == (6 + 20) / 4
    assert found.ttft_s is not None
    assert (found.ttft_s.min, found.ttft_s.max) == (1.0, 3.0)
    assert found.itl_s is not None
    assert (found.itl_s.count, found.itl_s.min, found.itl_s.max) == (3, 0.5, 1.0)
    assert found.tpot_s is not None  # (102 - 101) / 2 tokens, (104 - 103) / 2 tokens
    assert (found.tpot_s.min, found.tpot_s.max) == (0.5, 0.5)
    assert found.e2e_s is not None
    assert found.e2e_s.p50 == 3.0
    assert found.tokens_per_frame == 6 / 5
    assert found.client_cpu_share == 0.5 / 4
    assert found.client_wait_s is None


def test_waits_are_shown_with_a_rate():
    found = report(TWO, request_rate=2.0)
    assert found.client_wait_s is not None
    assert found.client_wait_s.p50 == 0.5
    assert any("sent late by" in line for line in serve_table([found]))


def test_failures_are_counted_and_in_no_distribution():
    failed = [made(100.0, [100.1], error="HTTP 429: full"), made(100.0, [], error="cut")]
    found = report([*TWO, *failed, failed[0]])
    assert found.errors == {"HTTP 429: full": 2, "cut": 1}
    assert (found.num_ok, found.num_errors) == (2, 3)
    assert found.ttft_s is not None
    assert found.ttft_s.min == 1.0
    assert found.num_output_tokens == 6
    table = "\n".join(serve_table([found]))
    assert "failed at concurrency 2: 2 x HTTP 429: full" in table
    assert "failed at concurrency 2: 1 x cut" in table
    assert "3 warm-up requests" in table


def test_when_all_fail_there_are_no_times():
    found = report([made(100.0, [], error="cut")])
    assert (found.ttft_s, found.itl_s, found.output_tok_s) == (None, None, 0.0)
    assert any(
        line.startswith("TTFT p50 (ms)") and line.endswith("-") for line in serve_table([found])
    )


def test_batch_times():
    times = batch_times(10.0, 13.5, [[11.0, 12.0, 13.0], [11.5, 12.0, 13.5]])
    assert times.e2e_s == 3.5
    assert times.ttft_s == [1.0, 1.5]
    assert times.itl_s == [1.0, 1.0, 0.5, 1.5]


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_plots_are_made(tmp_path: Path):
    pytest.importorskip("matplotlib")
    runs = [
        ServeRun(report(TWO), LoadResult(TWO, 100.0, 0.5)),
        ServeRun(report([made(100.0, [], error="cut")]), LoadResult([], 100.0, 0.5)),
    ]
    plot_serve(runs, str(tmp_path / "serve.png"))
    rows = [{"model": "m", "dtype": "f", "n": 1, "in": 2, "out": 3, "output_tok_s": 1.5}]
    plot_throughput([row | {"total_tok_s": 3.0} for row in rows], str(tmp_path / "bars.png"))
    for name in ("serve", "bars"):
        width, height = png_size(tmp_path / f"{name}.png")
        assert width > 400
        assert height > 300


def test_a_plot_that_cannot_be_made_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match=r"\.png"):
        check_can_plot(str(tmp_path / "a.svg"))
    with pytest.raises(ConfigError, match="directory"):
        check_can_plot(str(tmp_path / "absent" / "a.png"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'jaxinfer\[bench\]'"):
        check_can_plot(str(tmp_path / "a.png"))
