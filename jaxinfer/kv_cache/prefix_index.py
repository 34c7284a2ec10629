"""Finds the page that holds the KV of given tokens in a given context. Knows no requests.

A full page is named by a digest over (digest of the page before, its tokens); the digest before
the first page is made of the salt, so requests of different salts can never share. A digest thus
names the whole prefix, and pages with equal digests hold equal KV. The chain follows the prefix
caching of vLLM (docs.vllm.ai, "Automatic Prefix Caching"); SHA-256 because a collision would
answer one user from another's prompt.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence

_DOMAIN = b"jaxinfer/kv-page/1"


def root_digest(salt: str | None) -> bytes:
    """Digest before the first page. No salt and the empty salt are different."""
    tag = b"\0" if salt is None else b"\1" + salt.encode()
    return hashlib.sha256(_DOMAIN + tag).digest()


def page_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full page. All pages have one size, so the bytes parse in one way only."""
    return hashlib.sha256(parent + array("i", token_ids).tobytes()).digest()


class PrefixIndex:
    """A one-to-one map between digests and the pages that hold their content.

    Digests may also be *promised*: somebody is computing their content and will publish it.
    """

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._promised: Counter[bytes] = Counter()  # how many compute it; never 0

    def find(self, digest: bytes) -> int | None:
        return self._page_of.get(digest)

    def holds(self, page: int) -> bool:
        return page in self._digest_of

    def publish(self, digest: bytes, page: int) -> None:
        """Makes a page findable. Of two pages with equal content the first one stays the known
        one: the other is as good for its holder, and is plainly free afterwards."""
        assert page not in self._digest_of, f"page {page} is published twice"
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def forget(self, page: int) -> None:
        """The page's content is gone (or not to be trusted). No-op for an unpublished page."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]

    @property
    def has_promises(self) -> bool:
        return bool(self._promised)

    def promise(self, digest: bytes) -> None:
        self._promised[digest] += 1

    def is_promised(self, digest: bytes) -> bool:
        return digest in self._promised

    def settle(self, digest: bytes) -> None:
        """One promise is kept, or never will be."""
        self._promised[digest] -= 1
        if not self._promised[digest]:
            del self._promised[digest]

    def clear(self) -> None:
        self._page_of.clear()
        self._digest_of.clear()
        self._promised.clear()

    def check_integrity(self, expected_promises: Counter[bytes]) -> None:
        assert self._promised == expected_promises, "promises without a promiser, or without end"
        inverse = {page: digest for digest, page in self._page_of.items()}
        assert inverse == self._digest_of, "the two directions of the prefix index differ"
