"""The work of a job: lines in, requests at once, records out. Memory is bounded by `concurrency`.

Lines are read in a thread, a few ahead of the requests; whoever is done writes its record at once.
Knows no files' forms, no engine and no protocol: those are the reader's, handler's and sink's.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

from jaxinfer.batch.lines import BadLine, Handler, Line, Reply
from jaxinfer.batch.records import bad_record, record_of
from jaxinfer.batch.sinks import Sink
from jaxinfer.batch.suspects import GO_ON, LOSSES_OF_A_SUSPECT, Losses, Turns, reason_of
from jaxinfer.errors import EngineDeadError

_LINES_AT_ONCE = 64
_BYTES_AT_ONCE = 4 * 2**20
_SYNC_EVERY_S = 5.0
_GIVE_UP_AFTER_S = 900.0  # without any answer: longer than an engine takes to start again

Item = Line | BadLine


@dataclass(kw_only=True)
class Counts:
    """What a run has done so far."""

    num_ok: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_in_work: int = 0

    @property
    def num_done(self) -> int:
        return self.num_ok + self.num_failed


class Pump:
    """One run over `lines`."""

    def __init__(
        self,
        lines: Iterator[Item],
        handler: Handler,
        sink: Sink,
        *,
        concurrency: int,
        counts: Counts,
        stop: asyncio.Event,
        max_losses: int,
        give_up_after_s: float = _GIVE_UP_AFTER_S,
    ) -> None:
        """`max_losses`: of the engine, without an answer between them."""
        self._lines = lines
        self._handler = handler
        self._sink = sink
        self._concurrency = concurrency
        self._counts = counts
        self._stop = stop
        self._give_up_after_s = give_up_after_s
        self._queue: asyncio.Queue[Item | None] = asyncio.Queue(maxsize=_LINES_AT_ONCE)
        self._num_queued_bytes = 0
        self._has_room = asyncio.Event()
        self._turns = Turns()
        self._losses = Losses(most_in_a_row=max_losses)
        self._refused_since_s: float | None = None

    async def run(self) -> None:
        """Ends when all lines are done, or once `stop` is set those in work.

        Cancelling it gives those up: the next run does them. Raises JaxInferError for what ends
        a job: input or output fails, or nothing is answered any more.
        """
        tasks = [asyncio.create_task(self._feed())]
        tasks += [asyncio.create_task(self._work()) for _ in range(self._concurrency)]
        work = asyncio.gather(*tasks)
        sync = asyncio.create_task(self._sync())
        try:
            await asyncio.wait({work, sync}, return_when=asyncio.FIRST_COMPLETED)
            await (sync if sync.done() else work)
        finally:
            for task in (*tasks, sync):
                task.cancel()
            await asyncio.gather(work, sync, return_exceptions=True)

    async def _feed(self) -> None:
        while not self._stop.is_set():
            items = await asyncio.to_thread(_take, self._lines)
            if not items:
                break
            for item in items:
                while self._num_queued_bytes > _BYTES_AT_ONCE:
                    self._has_room.clear()
                    await self._has_room.wait()
                self._num_queued_bytes += _num_bytes(item)
                await self._queue.put(item)
        for _ in range(self._concurrency):
            await self._queue.put(None)

    async def _work(self) -> None:
        counts = self._counts
        while (item := await self._queue.get()) is not None:
            self._num_queued_bytes -= _num_bytes(item)
            self._has_room.set()
            if self._stop.is_set():
                continue  # read and not begun: the next run does it
            if isinstance(item, BadLine):
                self._sink.write(bad_record(item))
                counts.num_failed += 1
                continue
            counts.num_in_work += 1
            try:
                reply = await self._ask(item)
            finally:
                counts.num_in_work -= 1
            if reply is not None:
                self._sink.write(record_of(item, reply))
                self._count(reply)

    async def _ask(self, line: Line) -> Reply | None:
        """The answer. What is said of the moment and not of the line (busy, restarting) is none.

        None where a stop came while the line waited for suspects and had not been asked yet.
        """
        num_losses = 0
        was_asked = False
        while True:
            is_suspect = num_losses >= LOSSES_OF_A_SUSPECT
            async with self._turns.turn(alone=is_suspect):
                if self._stop.is_set() and not was_asked:
                    return None
                was_asked = True
                serial = self._losses.serial
                reply = await self._handler(line)
                if is_suspect and reply.lost_engine:
                    return self._losses.blame(line, reply)
            if reply.retry_after_s is None:
                self._refused_since_s = None
                self._losses.answered()
                return reply
            if reply.lost_engine:
                num_losses += 1
                self._losses.count(reply, serial=serial)
                self._refused_since_s = None  # it was at work until now, however long that was
            self._check_patience(reply, reply.retry_after_s)
            await asyncio.sleep(reply.retry_after_s)

    def _check_patience(self, reply: Reply, wait_s: float) -> None:
        """Raises EngineDeadError when nothing but refusals has come for too long."""
        now_s = time.monotonic()
        if self._refused_since_s is None:
            self._refused_since_s = now_s
        silent_s = now_s - self._refused_since_s
        if silent_s + wait_s > self._give_up_after_s:
            raise EngineDeadError(
                f"Nothing has been answered for {silent_s:.0f} s: {reason_of(reply)} {GO_ON}"
            )

    def _count(self, reply: Reply) -> None:
        counts = self._counts
        if reply.status == 200:
            counts.num_ok += 1
        else:
            counts.num_failed += 1
        usage = reply.body.get("usage") or {}
        counts.num_prompt_tokens += usage.get("prompt_tokens") or 0
        counts.num_output_tokens += usage.get("completion_tokens") or 0

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_EVERY_S)
            await asyncio.to_thread(self._sink.sync_later())


def _take(lines: Iterator[Item]) -> list[Item]:
    """The next few lines; none at the end. Raises JaxInferError where they cannot be read."""
    taken: list[Item] = []
    num_bytes = 0
    for item in itertools.islice(lines, _LINES_AT_ONCE):
        taken.append(item)
        num_bytes += _num_bytes(item)
        if num_bytes > _BYTES_AT_ONCE:
            break
    return taken


def _num_bytes(item: Item) -> int:
    return item.num_bytes if isinstance(item, Line) else 0
