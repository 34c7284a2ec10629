"""Reference counts and the order in which free pages are reused."""

import pytest

from jaxinfer.kv_cache.block_pool import BlockPool


def test_pages_are_reused_least_recently_used_first():
    pool = BlockPool(4)
    assert pool.take(4) == [0, 1, 2, 3]
    for page in (2, 0, 3, 1):
        pool.release(page, keep_content=True)
    assert pool.take(4) == [2, 0, 3, 1]


def test_pages_without_content_are_reused_first():
    pool = BlockPool(3)
    pool.take(3)
    pool.release(0, keep_content=True)
    pool.release(1, keep_content=False)
    pool.release(2, keep_content=True)
    assert pool.take(3) == [1, 0, 2]


def test_a_page_is_free_only_when_its_last_holder_lets_go():
    pool = BlockPool(2)
    (page,) = pool.take(1)
    pool.share(page)
    pool.release(page, keep_content=True)
    assert pool.num_free == 1
    pool.check_integrity([1, 0])
    pool.release(page, keep_content=True)
    assert pool.num_free == 2
    pool.share(page)  # a free page is taken for its content
    assert (pool.num_free, pool.ref_count(page)) == (1, 1)
    assert page not in pool.take(1)


def test_misuse_is_caught():
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 pages wanted, 2 are free"):
        pool.take(3)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.release(0, keep_content=False)
    pool.take(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([0, 0])
