"""Progress: a moving line on a terminal, log lines elsewhere."""

import io
import logging

import pytest

from jaxinfer.cli.progress import PhaseReporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_per_phase_in_the_end():
    stream = Terminal()
    report = PhaseReporter(stream)
    report("load weights", 1, 10)
    report("load weights", 10, 10)
    report("compile", 0, 0)
    report.close()
    report.close()
    lines = [line.rpartition("\x1b[K")[2] for line in stream.getvalue().split("\n")[:-1]]
    assert [line.partition(":")[0] for line in lines] == ["load weights", "compile"]
    assert "load weights 10/10" in stream.getvalue()


def test_bytes_are_shown_as_such():
    stream = Terminal()
    PhaseReporter(stream)("download", 50 * 2**20, 100 * 2**20)
    assert "50/100 MiB" in stream.getvalue()


def test_elsewhere_each_phase_is_logged(caplog: pytest.LogCaptureFixture):
    stream = io.StringIO()
    with caplog.at_level(logging.INFO, logger="jaxinfer.cli.progress"):
        report = PhaseReporter(stream)
        for done in range(100):
            report("compile", done, 100)
        report.close()
    assert stream.getvalue() == ""
    assert [record.message.split()[0] for record in caplog.records] == ["compile", "compile"]
