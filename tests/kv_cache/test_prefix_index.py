"""Digests name whole prefixes; the index is one-to-one."""

import itertools
from collections import Counter

import pytest

from jaxinfer.kv_cache.prefix_index import PrefixIndex, page_digest, root_digest


def test_digest_depends_on_salt_tokens_order_and_everything_before():
    roots = [root_digest(salt) for salt in (None, "", "a", "b")]
    pages = [page_digest(root, tokens) for root in roots for tokens in ([1, 2], [2, 1])]
    children = [page_digest(page, [1, 2]) for page in pages]
    assert len({*roots, *pages, *children}) == len(roots) + len(pages) + len(children)


def test_digest_is_the_same_for_the_same_tokens_in_another_container():
    assert page_digest(b"x", [1, 2**31 - 1]) == page_digest(b"x", (1, 2**31 - 1))


def test_token_ids_do_not_run_into_each_other():
    tokens = [0, 1, 256, 65536]
    pairs = list(itertools.product(tokens, tokens))
    assert len({page_digest(b"", pair) for pair in pairs}) == len(pairs)


def test_of_two_equal_pages_the_first_stays_known():
    index = PrefixIndex()
    index.publish(b"d", 7)
    index.publish(b"d", 8)
    assert index.find(b"d") == 7
    assert index.holds(7)
    assert not index.holds(8)
    index.forget(8)  # never known
    assert index.find(b"d") == 7
    index.forget(7)
    assert index.find(b"d") is None
    index.check_integrity(Counter())


def test_a_page_has_one_content():
    index = PrefixIndex()
    index.publish(b"d", 7)
    with pytest.raises(AssertionError, match="twice"):
        index.publish(b"e", 7)


def test_clear():
    index = PrefixIndex()
    index.publish(b"d", 7)
    index.clear()
    assert index.find(b"d") is None
    assert not index.holds(7)
