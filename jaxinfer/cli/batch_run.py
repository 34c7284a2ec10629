"""One run of a batch job: opens its ends, starts the engine, pumps, and says how it went.

Shared by `run` and `run-batch`. Joins `batch`, which knows files, to the server's routes, which
know requests; neither knows the other.
"""

import asyncio
import signal
from contextlib import AsyncExitStack, suppress
from typing import NamedTuple

from jaxinfer.batch.delivery import deliver
from jaxinfer.batch.files import InputFile, shown_path
from jaxinfer.batch.job import OpenJob, check_inputs, open_job
from jaxinfer.batch.progress import Meter, shown_progress
from jaxinfer.batch.pump import Counts, Pump
from jaxinfer.batch.suspects import GO_ON
from jaxinfer.cli.batch_engine import RunningEngine, running_engine
from jaxinfer.config.fields import flatten
from jaxinfer.config.job import JobConfig, input_format
from jaxinfer.config.preview import local_model_facts, preview
from jaxinfer.engine.build import DEFAULT_RUNNER_FACTORY
from jaxinfer.engine.model_source import LoadedModel, load_model_tokenizer
from jaxinfer.engine.progress import start_progress
from jaxinfer.errors import ConfigError, EngineDeadError, RequestError
from jaxinfer.logging import get_logger
from jaxinfer.server.direct import CHAT_URL, COMPLETION_URL, DirectApi, check_defaults

logger = get_logger(__name__)


class _End(NamedTuple):
    """How a run ended: all lines done, or by this signal."""

    signal_number: int | None


def _has_whole_requests(job: JobConfig, files: list[InputFile]) -> bool:
    """Some lines say themselves which route they are for."""
    return any(input_format(job.inputs, file.path) == "openai" for file in files)


def _check_sampling(job: JobConfig, files: list[InputFile]) -> None:
    """Raises ConfigError for a default that no request of the job could have."""
    own = CHAT_URL if job.inputs.mode == "chat" else COMPLETION_URL
    urls = (CHAT_URL, COMPLETION_URL) if _has_whole_requests(job, files) else (own,)
    check_defaults(job.sampling, urls)


def shown_job(job: JobConfig) -> str:
    """The job as YAML, with what is left to be chosen. Raises ConfigError as a run would."""
    _check_sampling(job, check_inputs(job))
    sections = {
        "sampling": job.sampling,
        "inputs": flatten(job.inputs),
        "outputs": flatten(job.outputs),
    }
    model = local_model_facts(job.batch.engine.model.model)
    return preview(job.batch.engine, flatten(job.batch.run), model=model, sections=sections)


def run_job(
    job: JobConfig, *, overwrite: bool, runner_factory: str = DEFAULT_RUNNER_FACTORY
) -> int:
    """0 when every line has an answer or an error in the output, else 128 + the signal.

    Raises ConfigError for what is wrong before the work, JaxInferError for what ends it.
    """
    files = check_inputs(job)
    _check_sampling(job, files)
    counts, end = Counts(), _End(None)
    with open_job(job, files, overwrite=overwrite) as opened:
        if not opened.is_finished:
            model = _load(job, opened, is_chat=not _has_whole_requests(job, files))
            end = asyncio.run(_Run(job, opened, counts, runner_factory).run(model))
        if end.signal_number is None:
            opened.sink.finish()
    if end.signal_number is None:
        deliver(job.outputs)
    _tell(job, opened, counts, end)
    return 0 if end.signal_number is None else 128 + end.signal_number


def _load(job: JobConfig, opened: OpenJob, *, is_chat: bool) -> LoadedModel:
    """The tokenizer. A missing chat template is known here, not by an error in every line."""
    if opened.num_before:
        of = "" if opened.total is None else f" of {opened.total}"
        logger.info("going on: %d%s lines are done", opened.num_before, of)
    with start_progress() as on_progress:
        model = load_model_tokenizer(job.batch.engine, on_progress)
    if is_chat and job.inputs.mode == "chat":
        try:
            model.tokenizer.render_chat([{"role": "user", "content": "x"}])
        except RequestError as error:
            message = f"inputs.mode=chat: {error} Or set inputs.mode to completion."
            raise ConfigError(message) from error
    return model


class _Run:
    """The asynchronous part."""

    def __init__(
        self, job: JobConfig, opened: OpenJob, counts: Counts, runner_factory: str
    ) -> None:
        self._job = job
        self._opened = opened
        self._counts = counts
        self._runner_factory = runner_factory
        self._stop = asyncio.Event()  # no new lines; those in work finish
        self._hurry = asyncio.Event()  # those in work are given up
        self._signal: int | None = None

    async def run(self, model: LoadedModel) -> _End:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        work = asyncio.create_task(self._work(model))
        due = asyncio.create_task(self._stop_is_due())
        try:
            await asyncio.wait({work, due}, return_when=asyncio.FIRST_COMPLETED)
            if due.done():
                work.cancel()
            with suppress(asyncio.CancelledError):
                await work
        finally:
            due.cancel()
            await asyncio.gather(due, return_exceptions=True)
        return _End(self._signal)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set() or not self._counts.num_in_work:
            self._hurry.set()
        else:
            logger.info(
                "stopping: %d lines in work get %g s; once more to end at once",
                self._counts.num_in_work,
                self._job.batch.run.shutdown_timeout,
            )
        self._signal = number
        self._stop.set()

    async def _stop_is_due(self) -> None:
        """Returns when a stop was asked for and its time is over."""
        await self._stop.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._job.batch.run.shutdown_timeout):
                await self._hurry.wait()

    async def _work(self, model: LoadedModel) -> None:
        async with AsyncExitStack() as stack:
            with start_progress() as on_progress:
                engine = running_engine(
                    self._job.batch, model, on_progress, runner_factory=self._runner_factory
                )
                running = await stack.enter_async_context(engine)
            await self._pump(running)

    async def _pump(self, running: RunningEngine) -> None:
        opened = self._opened
        pump = Pump(
            opened.lines,
            DirectApi(running.state, defaults=self._job.sampling).answer,
            opened.sink,
            concurrency=self._concurrency(running),
            counts=self._counts,
            stop=self._stop,
            max_losses=self._job.batch.run.engine_max_restarts,
        )
        meter = Meter(self._counts, num_before=opened.num_before, total=opened.total)
        work = asyncio.create_task(pump.run())
        death = asyncio.create_task(running.engine.wait_dead())
        try:
            async with shown_progress(meter):
                await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise EngineDeadError(f"{death.result()} {GO_ON}")
            work.result()
        finally:
            for task in (work, death):
                task.cancel()
            await asyncio.gather(work, death, return_exceptions=True)

    def _concurrency(self, running: RunningEngine) -> int:
        """Enough that a place in the engine never stays empty; no more than its queue takes."""
        asked = self._job.batch.run.concurrency
        if asked is not None:
            return asked
        num_running = running.engine.info.max_num_seqs
        num_waiting = min(num_running, self._job.batch.engine.scheduler.max_num_queued_reqs)
        return num_running + num_waiting


def _tell(job: JobConfig, opened: OpenJob, counts: Counts, end: _End) -> None:
    """The last line, on stdout: what this run did, and what to do when it was ended."""
    figures = f"{counts.num_ok} ok, {counts.num_failed} failed, {opened.num_before} done before"
    if end.signal_number is None:
        num_done = counts.num_done + opened.num_before
        print(f"done: {num_done} lines ({figures}): {shown_path(job.outputs.path)}")
        return
    name = signal.Signals(end.signal_number).name
    num_done = counts.num_done + opened.num_before
    of = "" if opened.total is None else f" of {opened.total}"
    print(f"stopped by {name}: {num_done}{of} lines are done ({figures}). {GO_ON}")
