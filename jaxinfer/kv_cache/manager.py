"""Gives sequences their pages, and finds pages they can share. Knows tokens, not queues or slots.

The manager does not know which tokens the device has computed: the caller says so (`publish`).
Only full pages are shared, and a sequence always computes at least its last token itself, so it
never writes into a page that someone else may read.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from jaxinfer.kv_cache.block_pool import BlockPool
from jaxinfer.kv_cache.layout import num_pages_for
from jaxinfer.kv_cache.prefix_index import PrefixIndex, page_digest, root_digest

ReadTokens = Callable[[int, int], Sequence[int]]
"""(start, stop) -> the sequence's tokens at these positions, all of them known to the host."""

_NO_PAGES: tuple[int, ...] = ()


@dataclass(kw_only=True, slots=True, eq=False)
class SequencePages:
    """The pages of one sequence; changed by the manager only."""

    read_tokens: ReadTokens
    salt: str | None = None
    pages: list[int] = field(default_factory=list)
    # Of the leading full pages, as far as they were needed. They outlive the pages: a preempted
    # sequence finds its own pages again without hashing anew.
    digests: list[bytes] = field(default_factory=list)
    num_published: int = 0  # leading pages that were found in, or offered to, the index
    num_promised: int = 0  # leading pages that are published or will be
    generation: int = 0  # of the cache content that `pages` belong to


class KVCacheManager:
    """Pages of all sequences of one engine."""

    def __init__(self, *, num_pages: int, page_size: int, enable_prefix_caching: bool) -> None:
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self._pool = BlockPool(num_pages)
        self._index = PrefixIndex()
        self._generation = 0

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free

    def admit(
        self, seq: SequencePages, *, num_tokens: int, max_hit_tokens: int, num_spare_pages: int
    ) -> int | None:
        """Gives a sequence all pages for `num_tokens` tokens, shared ones where possible.

        At most `max_hit_tokens` tokens are taken from the cache. Returns how many were, or None
        (and changes nothing) if `num_spare_pages` free pages would not be left over.
        """
        assert not seq.pages, "the sequence has pages already"
        hits = self._match(seq, max_hit_tokens)
        num_new = num_pages_for(num_tokens, self.page_size) - len(hits)
        num_unheld_hits = sum(self._pool.ref_count(page) == 0 for page in hits)
        if num_new + num_unheld_hits + num_spare_pages > self._pool.num_free:
            return None
        for page in hits:  # before taking new ones, which could evict them
            self._pool.share(page)
        seq.pages = hits + self._take(num_new)
        seq.num_published = len(hits)
        seq.generation = self._generation
        if self.enable_prefix_caching:
            self._promise(seq, num_tokens // self.page_size)
        return len(hits) * self.page_size

    def num_tokens_promised(self, seq: SequencePages, max_hit_tokens: int) -> int:
        """How many more tokens a sequence without pages could share if it were admitted later:
        those behind its present hits that admitted sequences are computing."""
        if not self._index.has_promises:
            return 0
        num_hits = len(self._match(seq, max_hit_tokens))
        end = max_hit_tokens // self.page_size
        for index in range(num_hits, end):
            self._hash_pages(seq, index + 1)
            if not self._index.is_promised(seq.digests[index]):
                end = index
                break
        return (end - num_hits) * self.page_size

    def grow(self, seq: SequencePages, num_tokens: int) -> Sequence[int] | None:
        """Makes room for `num_tokens` tokens in all. Returns the pages that were added, or None
        (and changes nothing) if too few are free."""
        if num_tokens <= len(seq.pages) * self.page_size:
            return _NO_PAGES
        num_new = num_pages_for(num_tokens, self.page_size) - len(seq.pages)
        if num_new > self._pool.num_free:
            return None
        new_pages = self._take(num_new)
        seq.pages += new_pages
        return new_pages

    def publish(self, seq: SequencePages, num_computed_tokens: int) -> None:
        """The device has computed these leading tokens, all known: their full pages are shared
        from now on."""
        num_full = num_computed_tokens // self.page_size
        if num_full <= seq.num_published or not self.enable_prefix_caching:
            return
        if seq.generation == self._generation:
            self._hash_pages(seq, num_full)
            for index in range(seq.num_published, num_full):
                self._index.publish(seq.digests[index], seq.pages[index])
                if index < seq.num_promised:
                    self._index.settle(seq.digests[index])
        seq.num_published = num_full

    def release(self, seq: SequencePages) -> None:
        """Takes all pages back. Published ones stay findable until they are handed out again,
        later ones of the sequence first: a prefix is worth more than what follows it."""
        for digest in self._open_promises(seq):
            self._index.settle(digest)
        for page in reversed(seq.pages):
            self._pool.release(page, keep_content=self._index.holds(page))
        seq.pages = []
        seq.num_published = seq.num_promised = 0

    def discard(self, seq: SequencePages) -> None:
        """Takes all pages back and makes sure that nobody finds their content (it is broken)."""
        for page in seq.pages:
            self._index.forget(page)
        self.release(seq)

    def reset_prefix_cache(self) -> None:
        """Forgets all content. Sequences that run go on, but publish none of it any more."""
        self._index.clear()
        self._generation += 1

    def check_integrity(self, holders: Iterable[SequencePages]) -> None:
        """Asserts that every page is free or held, as often as `holders` (all of them) say."""
        ref_counts = [0] * self._pool.num_pages
        promises: Counter[bytes] = Counter()
        for seq in holders:
            promises.update(self._open_promises(seq))
            assert seq.num_published <= len(seq.pages), "more pages published than held"
            assert len(set(seq.pages)) == len(seq.pages), "a sequence holds a page twice"
            for page in seq.pages:
                ref_counts[page] += 1
        self._pool.check_integrity(ref_counts)
        self._index.check_integrity(promises)

    def _match(self, seq: SequencePages, max_tokens: int) -> list[int]:
        """The longest run of cached pages from the start of the sequence."""
        hits: list[int] = []
        if not self.enable_prefix_caching:
            return hits
        for index in range(max_tokens // self.page_size):
            if index == len(seq.digests):
                self._hash_pages(seq, index + 1)
            page = self._index.find(seq.digests[index])
            if page is None:
                break
            hits.append(page)
        return hits

    def _promise(self, seq: SequencePages, num_pages: int) -> None:
        """The sequence will publish its leading pages."""
        self._hash_pages(seq, num_pages)
        seq.num_promised = num_pages
        for digest in self._open_promises(seq):
            self._index.promise(digest)

    def _open_promises(self, seq: SequencePages) -> Sequence[bytes]:
        """What the sequence has promised and not published."""
        if seq.generation != self._generation:  # it publishes nothing any more
            return ()
        return seq.digests[seq.num_published : seq.num_promised]

    def _hash_pages(self, seq: SequencePages, num_pages: int) -> None:
        for index in range(len(seq.digests), num_pages):
            parent = seq.digests[-1] if seq.digests else root_digest(seq.salt)
            start = index * self.page_size
            tokens = seq.read_tokens(start, start + self.page_size)
            assert len(tokens) == self.page_size, "a page is not full of known tokens"
            seq.digests.append(page_digest(parent, tokens))

    def _take(self, count: int) -> list[int]:
        pages = self._pool.take(count)
        for page in pages:
            self._index.forget(page)
        return pages
