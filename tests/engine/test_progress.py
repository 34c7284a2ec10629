"""Progress: bars on a terminal, silence elsewhere."""

import io
import time

import pytest

from jaxinfer.engine.progress import batch_progress, start_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def test_a_terminal_shows_each_phase(terminal: Terminal):
    with start_progress(terminal) as report:
        report("load weights", 1, 10)
        report("load weights", 10, 10)
        report("compile", 0, 0)
    shown = terminal.getvalue()
    assert "load weights" in shown
    assert "10/10" in shown
    assert "compile" in shown


def test_the_clock_of_a_phase_stops_when_the_next_begins(terminal: Terminal):
    with start_progress(terminal) as report:
        report("locate model", 0, 0)
        report("compile", 1, 4)
        time.sleep(1.2)
        report("compile", 4, 4)
    last_frame = terminal.getvalue().rpartition("locate model")[2]
    first, _, second = last_frame.partition("compile")
    assert "0:00:00" in first
    assert "0:00:01" in second


def test_bytes_are_shown_as_such(terminal: Terminal):
    with start_progress(terminal) as report:
        report("download", 50 * 2**20, 100 * 2**20)
    assert "50/100 MiB" in terminal.getvalue()


def test_elsewhere_nothing_is_written():
    stream = io.StringIO()
    with start_progress(stream) as report:
        for done in range(100):
            report("compile", done, 100)
    assert stream.getvalue() == ""


def test_elsewhere_each_phase_has_its_line_if_asked():
    stream = io.StringIO()
    with start_progress(stream, with_lines=True) as report:
        for done in range(100):
            report("compile", done, 100)
        report("load weights", 0, 0)
    phases = [line.rpartition(" s: ")[2] for line in stream.getvalue().splitlines()]
    assert phases == ["compile", "load weights", "ready"]


def test_a_start_that_fails_is_not_ready():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), start_progress(stream, with_lines=True) as report:
        report("compile", 0, 3)
        raise RuntimeError
    assert "compile" in stream.getvalue()
    assert "ready" not in stream.getvalue()


def test_a_batch_counts_its_prompts(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr", terminal)
    with batch_progress(3, is_shown=True) as count:
        count()
        count()
    assert "2/3" in terminal.getvalue()


def test_a_batch_is_silent_when_asked(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr", terminal)
    with batch_progress(3, is_shown=False) as count:
        count()
    assert terminal.getvalue() == ""
