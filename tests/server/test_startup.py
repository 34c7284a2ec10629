"""The log while an engine starts: a phase that hangs is named."""

import asyncio
import logging

import pytest

from jaxinfer.server.startup import StartupLog

TELL_S = 0.05


async def messages(caplog: pytest.LogCaptureFixture, log: StartupLog, *, is_over: bool) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        watch = asyncio.create_task(log.watch(lambda: is_over))
        await asyncio.sleep(4 * TELL_S)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    return caplog.text


async def test_a_phase_that_hangs_is_named(caplog: pytest.LogCaptureFixture) -> None:
    shown: list[str] = []
    log = StartupLog(shown.append, tell_every_s=TELL_S)
    log("load", 0, 0)
    log("compile", 3, 9)
    log("compile", 3, 9)
    assert shown == ["load", "compile 3/9"]
    text = await messages(caplog, log, is_over=False)
    assert "still in phase 'compile 3/9' since 0 s, no progress for 0 s" in text
    assert text.count("still in phase") >= 2
    assert await messages(caplog, log, is_over=True) == ""


async def test_a_phase_that_gets_on_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    log = StartupLog(lambda _: None, tell_every_s=TELL_S)
    log("compile", 0, 1000)

    async def get_on() -> None:
        for done in range(1, 1000):
            log("compile", done, 1000)
            await asyncio.sleep(TELL_S / 20)

    work = asyncio.create_task(get_on())
    text = await messages(caplog, log, is_over=False)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert "/1000 (0 s)" in text
