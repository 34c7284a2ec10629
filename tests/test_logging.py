"""One handler, one format, and phases with their seconds."""

import logging
import threading

import pytest

from jaxinfer.logging import ROOT, configure_logging, get_logger, log_phase


def test_lines_name_time_level_process_and_module(capsys: pytest.CaptureFixture[str]):
    configure_logging("info", process="server")
    get_logger("jaxinfer.engine.client").info("hello %d", 5)
    get_logger("jaxinfer.engine.client").debug("not shown")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in ("INFO", "server", "jaxinfer.engine.client", "hello 5"):
        assert word in error


def test_configuring_again_does_not_print_twice(capsys: pytest.CaptureFixture[str]):
    configure_logging("info")
    configure_logging("debug", process="core")
    get_logger("jaxinfer").debug("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_phase_says_how_long_it_took_also_when_it_fails(capsys: pytest.CaptureFixture[str]):
    configure_logging("info")
    with log_phase(get_logger("jaxinfer"), "load weights"):
        pass
    with pytest.raises(RuntimeError), log_phase(get_logger("jaxinfer"), "compile"):
        raise RuntimeError
    lines = capsys.readouterr().err.splitlines()
    assert "load weights done in 0.0 s" in lines[1]
    assert "compile failed after 0.0 s" in lines[3]


def test_a_phase_that_hangs_is_named_with_what_it_does(capsys: pytest.CaptureFixture[str]):
    configure_logging("warning")
    told = threading.Event()
    with log_phase(get_logger("jaxinfer"), "compile", tell_every_s=0.02) as phase:
        phase.detail = "decode 4x4"
        logging.getLogger(ROOT).addFilter(_Listener("still in compile (decode 4x4)", told))
        assert told.wait(20.0)
    assert "still in compile (decode 4x4) after 0 s" in capsys.readouterr().err


def test_no_phase_is_watched_once_it_is_over():
    with log_phase(get_logger("jaxinfer"), "compile"):
        assert any(thread.name == "watch compile" for thread in threading.enumerate())
    assert not any(thread.name == "watch compile" for thread in threading.enumerate())


class _Listener(logging.Filter):
    """Lets everything pass, and tells when a line comes."""

    def __init__(self, text: str, told: threading.Event) -> None:
        super().__init__()
        self._text, self._told = text, told

    def filter(self, record: logging.LogRecord) -> bool:
        if self._text in record.getMessage():
            self._told.set()
        return True


def test_only_names_below_the_root_are_loggers_of_ours():
    with pytest.raises(AssertionError):
        get_logger("other")
