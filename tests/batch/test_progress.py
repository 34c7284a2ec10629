"""What is said of a job while it runs."""

import asyncio
import io
import logging

import pytest

from jaxinfer.batch.progress import Meter, shown_duration, shown_progress
from jaxinfer.batch.pump import Counts


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_figures(monkeypatch: pytest.MonkeyPatch):
    now_s = 100.0
    monkeypatch.setattr("jaxinfer.batch.progress.time.monotonic", lambda: now_s)
    counts = Counts()
    meter = Meter(counts, num_before=1000, total=3000)
    assert "1000/3000 lines, 0 in work, 0 tokens/s in, 0 out, unknown time left" in str(meter)
    now_s = 110.0
    counts.num_ok, counts.num_failed, counts.num_in_work = 490, 10, 7
    counts.num_prompt_tokens, counts.num_output_tokens = 5000, 2000
    # 500 lines in 10 s; those done before this run say nothing about its speed
    words = "1500/3000 lines, 10 failed, 7 in work, 500 tokens/s in, 200 out, 0:30 left"
    assert str(meter) == words
    assert "1500 lines" in str(Meter(counts, num_before=1000, total=None))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (7500, "2:05:00")])
def test_durations(seconds: float, text: str):
    assert shown_duration(seconds) == text


async def test_a_log_line_now_and_then_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture,
):
    stream = io.StringIO()
    meter = Meter(Counts(num_ok=3), num_before=0, total=9)
    with caplog.at_level(logging.INFO, logger="jaxinfer"):
        async with shown_progress(meter, stream=stream, log_every_s=0.001):
            while not caplog.messages:  # noqa: ASYNC110 - the log has no event
                await asyncio.sleep(0.001)
    assert caplog.messages[0].startswith("3/9 lines")
    assert stream.getvalue() == ""


async def test_a_bar_on_a_terminal(caplog: pytest.LogCaptureFixture):
    stream = FakeTerminal()
    meter = Meter(Counts(num_ok=3), num_before=0, total=9)
    async with shown_progress(meter, stream=stream, log_every_s=0.001):
        await asyncio.sleep(0.01)
    assert "3/9 lines" in stream.getvalue()
    assert not caplog.messages
