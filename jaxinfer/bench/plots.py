"""Plots of the benchmarks' measurements as PNG files. The only module that needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxinfer.bench.latency import LatencyRun
from jaxinfer.bench.serve import ServeRun, inter_token_s
from jaxinfer.bench.stats import cumulative, rate_over_time
from jaxinfer.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUM_BINS = 60
_LOG_FROM = 10.0  # largest value over smallest


def check_can_plot(path: str) -> None:
    """Raises ConfigError before anything long is measured for a plot that cannot be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--plot={path} needs matplotlib: pip install 'jaxinfer[bench]'."
        ) from error
    if Path(path).suffix != ".png":
        raise ConfigError(f"--plot={path} must be a .png file.")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--plot={path}: its directory does not exist.")


def _figure(num_axes: int, title: str) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(5.0 * num_axes, 3.8), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure, np.atleast_1d(figure.subplots(1, num_axes)).tolist()


def _cdf(axes: "Axes", values_s: Any, color: str = "C0", label: str | None = None) -> None:
    if len(values_s):
        x, y = cumulative(np.asarray(values_s) * 1e3)
        x, y = np.concatenate([x[:1], x]), np.concatenate([[0.0], y])
        axes.step(x, y, where="post", color=color, label=label)


def _finish_cdf(axes: "Axes", name: str) -> None:
    """Logarithmic when the tail is long, as it is wherever prompts and tokens share steps."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [x for line in axes.get_lines() for x in np.asarray(line.get_xdata()) if x > 0]
    if values and max(values) > _LOG_FROM * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize="small", rotation=30)
    axes.set_xlabel(f"{name}, ms")
    axes.set_ylabel("share of values at most x")
    axes.set_ylim(0, 1.02)
    axes.grid(visible=True, alpha=0.3)
    if any(not str(line.get_label()).startswith("_") for line in axes.get_lines()):
        axes.legend()


def plot_serve(runs: Sequence[ServeRun], path: str) -> None:
    """TTFT and inter-token distributions, and output tokens/s over time; a line a level."""
    report = runs[0].report
    figure, (ttft, itl, over_time) = _figure(3, f"{Path(report.model).name}, {report.endpoint}")
    for number, run in enumerate(runs):
        done = [exchange for exchange in run.result.exchanges if exchange.error is None]
        level = run.report.max_concurrency
        label = "no limit" if level is None else f"{level} at a time"
        color = f"C{number}"
        _cdf(ttft, [exchange.ttft_s for exchange in done], color, label)
        _cdf(itl, inter_token_s(done), color, label)
        times_s = [time for exchange in done for time in exchange.token_times_s]
        bin_s = max(run.report.duration_s / _NUM_BINS, 1e-3)
        rate = rate_over_time(np.asarray(times_s) - run.result.start_s, bin_s)
        rate = rate * run.report.tokens_per_frame
        over_time.step(np.arange(len(rate)) * bin_s, rate, where="post", color=color, label=label)
    _finish_cdf(ttft, "time to first token")
    _finish_cdf(itl, "time between tokens")
    over_time.set_xlabel("time, s")
    over_time.set_ylabel("output tokens/s")
    over_time.set_ylim(bottom=0)
    over_time.grid(visible=True, alpha=0.3)
    over_time.legend()
    _save(figure, path)


def plot_latency(run: LatencyRun, path: str) -> None:
    """The three distributions of a latency run."""
    report = run.report
    shape = f"{report.batch_size} x {report.input_len}/{report.output_len}"
    figure, (e2e, ttft, itl) = _figure(3, f"{Path(report.model).name}, {shape}, {report.dtype}")
    _cdf(e2e, [batch.e2e_s for batch in run.batches])
    _cdf(ttft, [value for batch in run.batches for value in batch.ttft_s])
    _cdf(itl, [value for batch in run.batches for value in batch.itl_s])
    _finish_cdf(e2e, "end to end")
    _finish_cdf(ttft, "time to first token")
    _finish_cdf(itl, "time between tokens")
    _save(figure, path)


def plot_throughput(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Output and all tokens/s of each workload, as bars."""
    figure, (axes,) = _figure(1, f"{Path(rows[0]['model']).name}, {rows[0]['dtype']}")
    names = [f"{row['n']}x{row['in']}/{row['out']}" for row in rows]
    positions = np.arange(len(rows))
    for offset, key, label in ((-0.2, "output_tok_s", "output"), (0.2, "total_tok_s", "all")):
        bars = axes.bar(positions + offset, [row[key] for row in rows], 0.4, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize="x-small")
    axes.set_xticks(positions, names, fontsize="x-small")
    axes.set_xlabel("prompts x input/output tokens")
    axes.set_ylabel("tokens/s")
    axes.legend()
    _save(figure, path)


def _save(figure: "Figure", path: str) -> None:
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot={path}: cannot be written ({error.strerror}).") from error
