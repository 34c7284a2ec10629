"""The points at which attention is timed, and the bytes and operations each has. Data only.

Llama-3.1-8B's heads (8 kv heads, 4 query heads each) unless a point says otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

_MOST_KV_BYTES = 16e9  # of one layer's cache; with its copy in another layout it must fit


@dataclass(frozen=True, kw_only=True)
class Point:
    """A step of one layer: `batch` sequences with `context` tokens before it, `chunk` new ones."""

    batch: int
    context: int
    chunk: int = 1
    num_kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 16

    @property
    def is_decode(self) -> bool:
        return self.chunk == 1

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def length(self) -> int:
        """Keys of each sequence once the step has written its own."""
        return self.context + self.chunk

    @property
    def kv_bytes(self) -> int:
        """Keys and values that must be read, in 16 bits."""
        return self.batch * self.length * self.num_kv_heads * 2 * self.head_dim * 2

    @property
    def bytes_moved(self) -> int:
        """Keys and values, queries and outputs, each once."""
        return self.kv_bytes + 2 * self.batch * self.chunk * self.num_heads * self.head_dim * 2

    @property
    def flops(self) -> int:
        """Of both products, over the keys that causality lets a query see."""
        visible = self.chunk * self.context + self.chunk * (self.chunk + 1) // 2
        return 4 * self.batch * self.num_heads * self.head_dim * visible

    def describe(self) -> dict[str, int]:
        return {
            "batch": self.batch,
            "context": self.context,
            "chunk": self.chunk,
            "head_dim": self.head_dim,
            "page_size": self.page_size,
        }


def points(*, is_tiny: bool) -> list[Point]:
    """By what matters most: the goals first, then the rest of the grid."""
    if is_tiny:
        small = {"num_kv_heads": 1, "group": 2, "head_dim": 64}
        return [
            Point(batch=2, context=31, **small),
            Point(batch=1, context=0, chunk=32, **small),
        ]
    return list(dict.fromkeys(_wanted()))


def _wanted() -> Iterator[Point]:
    yield Point(batch=16, context=4096)
    yield Point(batch=1, context=32768)
    yield Point(batch=1, context=0, chunk=8192)
    for batch, context in product((64, 256, 16, 1), (4096, 512, 32768)):
        point = Point(batch=batch, context=context)
        if point.kv_bytes <= _MOST_KV_BYTES:
            yield point
    for chunk, context in ((2048, 0), (512, 0), (2048, 30720)):
        yield Point(batch=1, context=context, chunk=chunk)
    for page_size, head_dim in ((32, 128), (64, 128), (16, 64), (64, 64)):
        yield Point(batch=16, context=4096, page_size=page_size, head_dim=head_dim)
    yield Point(batch=1, context=0, chunk=8192, head_dim=64)
