"""What travels through a batch job: a line of the input, and the reply to it. Plain values.

Knows nothing of files, engines or the protocol that is spoken inside of bodies.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Line(NamedTuple):
    """A request to make."""

    number: int  # from 1, over all inputs; the name of the line within the job
    where: str  # file and line, for people
    custom_id: str
    url: str
    body: dict[str, Any]
    num_bytes: int  # about how large the body is


class BadLine(NamedTuple):
    """A line that no request can be made of."""

    number: int
    where: str
    custom_id: str | None
    message: str


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a request, as an HTTP server would give it."""

    status: int
    body: dict[str, Any]
    request_id: str
    retry_after_s: float | None = None  # given: not an answer yet, ask again after so long
    lost_engine: bool = False  # not an answer: the engine ended while it worked on the line


Handler = Callable[[Line], Awaitable[Reply]]
"""Answers a request; raises only what must end the job."""


class Reader(Protocol):
    """Something that lines can be read from, again and again from the start."""

    def read(self, is_done: Callable[[int], bool]) -> Iterator[Line | BadLine]:
        """The lines whose number is not done, in order. Raises JaxInferError."""
        ...
