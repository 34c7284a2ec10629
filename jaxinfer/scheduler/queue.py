"""The waiting queue: who is next. Knows ranks, not requests, pages or steps.

A *rank* orders sequences for the whole of their life: (priority, arrival number), lower first;
under "fcfs" the priority counts as 0. A preempted sequence keeps its rank, so it returns to the
head of its equals by itself.
"""

import heapq
from collections.abc import Iterator
from typing import Generic, Literal, NamedTuple, TypeVar

SchedulingPolicy = Literal["fcfs", "priority"]
T = TypeVar("T")


class Rank(NamedTuple):
    """Sorts like a tuple; no two sequences have the same arrival number."""

    priority: int
    arrival: int


def make_rank(policy: SchedulingPolicy, *, priority: int, arrival: int) -> Rank:
    return Rank(priority if policy == "priority" else 0, arrival)


class WaitingQueue(Generic[T]):
    """A heap by rank; removal from the middle is lazy. Push, pop and remove are O(log n)."""

    def __init__(self) -> None:
        self._heap: list[Rank] = []  # may hold ranks of removed items
        self._items: dict[Rank, T] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        """In no order."""
        return iter(self._items.values())

    def push(self, rank: Rank, item: T) -> None:
        assert rank not in self._items, f"{rank} waits already"
        self._items[rank] = item
        heapq.heappush(self._heap, rank)

    def peek(self) -> T:
        """The item of the lowest rank; the queue must not be empty."""
        while self._heap[0] not in self._items:
            heapq.heappop(self._heap)
        return self._items[self._heap[0]]

    def pop(self) -> T:
        item = self.peek()
        del self._items[heapq.heappop(self._heap)]
        return item

    def remove(self, rank: Rank) -> None:
        del self._items[rank]
        # Ranks of removed items must not pile up behind a head that never moves.
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._items):
            self._heap = list(self._items)
            heapq.heapify(self._heap)
