"""Finds the line that ends the engine each time, so that it costs itself and not the job.

When an engine is lost, the lines in work are asked again, and nothing says whose fault it was. A
line that has seen two losses is a suspect and is asked alone: if that loses the engine too, the
line is to blame. Knows turns and counts; nothing of engines, files or what a line asks for.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from jaxinfer.batch.lines import Line, Reply
from jaxinfer.errors import EngineDeadError
from jaxinfer.logging import get_logger

logger = get_logger(__name__)

LOSSES_OF_A_SUSPECT = 2
MOST_BLAMED_IN_A_ROW = 8  # one more without an answer between: no line can be answered here
GO_ON = "Nothing is lost: start the same command again to go on."


class Turns:
    """Lines at work together, or one of them alone. Who must be alone goes before the others."""

    def __init__(self) -> None:
        self._num_at_work = 0
        self._num_alone = 0  # at work or waiting
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def turn(self, *, alone: bool) -> AsyncIterator[None]:
        """The block runs beside no other if `alone`, else beside none that is."""
        self._num_alone += alone
        try:
            while self._num_at_work if alone else self._num_alone:
                self._changed.clear()
                await self._changed.wait()
            self._num_at_work += 1
            try:
                yield
            finally:
                self._num_at_work -= 1
        finally:
            self._num_alone -= alone
            self._changed.set()


class Losses:
    """Counts the losses of an engine, and says when to stop hoping."""

    def __init__(self, *, most_in_a_row: int) -> None:
        """`most_in_a_row` losses may follow each other without an answer or a verdict."""
        self._most_in_a_row = most_in_a_row
        self._num_in_a_row = 0
        self._num_blamed = 0  # without an answer between
        self.serial = 0
        """Of the next loss. A line that was asked at that serial is the first to tell of it."""

    def answered(self) -> None:
        """The engine works."""
        self._num_in_a_row = self._num_blamed = 0

    def count(self, reply: Reply, *, serial: int) -> None:
        """One of the lines in work tells of a loss. Raises EngineDeadError for one too many."""
        if serial != self.serial:
            return  # another line has told of it
        self.serial += 1
        self._num_in_a_row += 1
        if self._num_in_a_row > self._most_in_a_row:
            times = f"{self._num_in_a_row} times without an answer between"
            how = times if self._num_in_a_row > 1 else "once, and may not be started again"
            raise EngineDeadError(f"The engine was lost {how}: {reason_of(reply)} {GO_ON}")

    def blame(self, line: Line, reply: Reply) -> Reply:
        """The answer to a suspect that lost the engine alone. Raises EngineDeadError when that
        has happened to too many in a row."""
        self.serial += 1
        self._num_in_a_row = 0
        self._num_blamed += 1
        if self._num_blamed > MOST_BLAMED_IN_A_ROW:
            raise EngineDeadError(
                f"{self._num_blamed} lines in a row lost the engine, each of them alone, the last "
                f"one {line.where}: {reason_of(reply)} The fault may not be theirs: "
                f"look for it first. {GO_ON}"
            )
        logger.error("%s loses the engine each time, also alone: it is given up", line.where)
        message = (
            f"{line.where}: the engine was lost each time it worked on this line, the last time "
            f"with nothing else in work: {reason_of(reply)}"
        )
        return Reply(status=500, body=_error(message), request_id=reply.request_id)


def reason_of(reply: Reply) -> str:
    """What a refusal says."""
    return (reply.body.get("error") or {}).get("message", "no reason given")


def _error(message: str) -> dict[str, Any]:
    """In the form of the server's errors."""
    kind = "InternalServerError"
    return {"error": {"message": message, "type": kind, "param": None, "code": 500}}
