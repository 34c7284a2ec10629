"""Who holds which page: reference counts and the list of free pages. Knows no tokens.

A free page may still hold content worth finding again. Free pages are therefore handed out least
recently used first, and pages without such content before all others.
"""

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Reference counts over pages 0 .. num_pages - 1; every operation on a page is O(1)."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._ref_counts = [0] * num_pages
        # Ordered: first out is first. (A plain dict degrades when its head is popped repeatedly.)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, page: int) -> int:
        return self._ref_counts[page]

    def take(self, count: int) -> list[int]:
        """Hands out free pages with one reference each; what they held may be overwritten."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} are free"
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Adds a reference to a page whose content is wanted, free or not."""
        if self._ref_counts[page] == 0:
            del self._free[page]
        self._ref_counts[page] += 1

    def release(self, page: int, *, keep_content: bool) -> None:
        """Drops a reference. A page that becomes free is reused last if its content counts."""
        assert self._ref_counts[page] > 0, f"page {page} is released but nobody holds it"
        self._ref_counts[page] -= 1
        if self._ref_counts[page] == 0:
            self._free[page] = None
            if not keep_content:
                self._free.move_to_end(page, last=False)

    def check_integrity(self, expected_ref_counts: Sequence[int]) -> None:
        """Asserts that the counts are the expected ones and that exactly the rest is free."""
        assert self._ref_counts == list(expected_ref_counts), "reference counts are off"
        unheld = {page for page, count in enumerate(self._ref_counts) if count == 0}
        assert unheld == self._free.keys(), "the free list is not the pages that nobody holds"
