"""Tables of the benchmarks' figures, as text for a terminal. Knows reports; prints nothing."""

from collections.abc import Sequence

from jaxinfer.bench.latency import LatencyReport
from jaxinfer.bench.serve import ServeReport
from jaxinfer.bench.stats import Distribution, aligned

_SHOWN = ("mean", "p50", "p90", "p99")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _time_rows(name: str, levels: Sequence[Distribution | None]) -> list[list[str]]:
    """A row for each of mean, p50, p90 and p99, a column for each level."""
    return [
        [
            f"{name} {part} (ms)",
            *("-" if level is None else _ms(getattr(level, part)) for level in levels),
        ]
        for part in _SHOWN
    ]


def latency_table(report: LatencyReport) -> list[str]:
    """All figures of a latency run, a column for each kind of time."""
    columns = {"end to end": report.e2e_s, "TTFT": report.ttft_s, "inter-token": report.itl_s}
    rows = [["ms", *columns]]
    for part in ("mean", "min", "p50", "p90", "p99", "max"):
        values = [_ms(getattr(one, part)) if one else "-" for one in columns.values()]
        rows.append([part, *values])
    return [
        f"{report.num_iters} batches of {report.batch_size} x {report.input_len}/"
        f"{report.output_len} tokens, {report.num_iters_warmup} before them not counted; "
        f"{report.dtype} on {report.device}",
        *aligned(rows),
        f"output tokens/s: {report.output_tok_s:.1f}",
    ]


def serve_table(reports: Sequence[ServeReport]) -> list[str]:
    """A column for each level of concurrency, and below it what there is to say of them."""
    rows = [
        ["concurrency", *(str(one.max_concurrency or "no limit") for one in reports)],
        ["requests done", *(str(one.num_ok) for one in reports)],
        ["requests failed", *(str(one.num_errors) for one in reports)],
        ["duration (s)", *(f"{one.duration_s:.2f}" for one in reports)],
        ["prompt tokens", *(str(one.num_prompt_tokens) for one in reports)],
        ["output tokens", *(str(one.num_output_tokens) for one in reports)],
        ["requests/s", *(f"{one.request_per_s:.2f}" for one in reports)],
        ["output tokens/s", *(f"{one.output_tok_s:.1f}" for one in reports)],
        ["all tokens/s", *(f"{one.total_tok_s:.1f}" for one in reports)],
        *_time_rows("TTFT", [one.ttft_s for one in reports]),
        *_time_rows("inter-token", [one.itl_s for one in reports]),
        *_time_rows("per output token", [one.tpot_s for one in reports]),
        *_time_rows("end to end", [one.e2e_s for one in reports]),
        ["client CPU (us/token)", *(f"{one.client_cpu_s_per_token * 1e6:.0f}" for one in reports)],
        ["client CPU (of a core)", *(f"{one.client_cpu_share:.1%}" for one in reports)],
    ]
    if any(one.client_wait_s for one in reports):
        rows += _time_rows("sent late by", [one.client_wait_s for one in reports])
    return [*aligned(rows), *_notes(reports)]


def _notes(reports: Sequence[ServeReport]) -> list[str]:
    notes = []
    if any(one.num_warmups for one in reports):
        count = max(one.num_warmups for one in reports)
        notes.append(f"{count} warm-up requests before each column are in none of the figures.")
    if not all(one.are_tokens_counted_by_server for one in reports):
        notes.append("The server sent no usage: output tokens are frames with text.")
    elif any(one.tokens_per_frame > 1.02 for one in reports):
        most = max(one.tokens_per_frame for one in reports)
        notes.append(
            f"Frames carry up to {most:.2f} tokens on average: inter-token is between frames, "
            "per output token is not."
        )
    for one in reports:
        for error, count in one.errors.items():
            level = one.max_concurrency or "no limit"
            notes.append(f"failed at concurrency {level}: {count} x {error}")
    return notes
