"""One handler, one format, and phases with their seconds."""

import logging
from collections.abc import Iterator

import pytest

from jaxinfer.logging import ROOT, configure_logging, get_logger, log_phase


@pytest.fixture(autouse=True)
def restore_logger() -> Iterator[None]:
    logger = logging.getLogger(ROOT)
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


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


def test_only_names_below_the_root_are_loggers_of_ours():
    with pytest.raises(AssertionError):
        get_logger("other")
