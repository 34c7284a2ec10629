"""Pages of sequences: sharing, growth, what stays findable."""

import pytest

from jaxinfer.kv_cache.manager import KVCacheManager, SequencePages

PAGE = 4


def make_manager(num_pages: int = 8, *, enable_prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(
        num_pages=num_pages, page_size=PAGE, enable_prefix_caching=enable_prefix_caching
    )


def make_seq(tokens: list[int], salt: str | None = None) -> SequencePages:
    return SequencePages(read_tokens=lambda start, stop: tokens[start:stop], salt=salt)


def admit(manager: KVCacheManager, tokens: list[int], salt: str | None = None):
    """A sequence of these tokens, and how many of them were found."""
    seq = make_seq(tokens, salt)
    num_hits = manager.admit(
        seq, num_tokens=len(tokens), max_hit_tokens=len(tokens) - 1, num_spare_pages=0
    )
    return seq, num_hits


TOKENS = list(range(10, 22))  # three full pages


def test_published_pages_are_shared():
    manager = make_manager()
    first, num_hits = admit(manager, TOKENS)
    assert num_hits == 0
    manager.publish(first, 9)
    second, num_hits = admit(manager, TOKENS)
    assert num_hits == 8
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert manager.num_free_pages == 8 - 4
    manager.check_integrity([first, second])


def test_the_last_token_is_never_taken_from_the_cache():
    manager = make_manager()
    first, _ = admit(manager, TOKENS)
    manager.publish(first, 12)
    assert admit(manager, TOKENS)[1] == 8
    assert admit(manager, [*TOKENS, 1])[1] == 12


def test_nothing_is_shared_before_it_is_published():
    manager = make_manager()
    admit(manager, TOKENS)
    assert admit(manager, TOKENS)[1] == 0


def test_salt_separates():
    manager = make_manager(32)
    for salt in (None, "", "a"):
        seq, num_hits = admit(manager, TOKENS, salt)
        assert num_hits == 0
        manager.publish(seq, 12)
    assert admit(manager, TOKENS, "a")[1] == 8


def test_prefix_caching_can_be_off():
    manager = make_manager(enable_prefix_caching=False)
    seq, _ = admit(manager, TOKENS)
    manager.publish(seq, 12)
    assert admit(manager, TOKENS)[1] == 0
    assert seq.digests == []


def test_freed_pages_are_found_until_they_are_needed_and_prefixes_stay_longest():
    manager = make_manager(4)
    first, _ = admit(manager, TOKENS)
    manager.publish(first, 12)
    manager.release(first)
    manager.check_integrity([])
    admit(manager, [1, 2, 3, 4, 5])  # the page never used, then the last of `first`
    again, num_hits = admit(manager, TOKENS[:8])
    assert num_hits == 4
    assert len(again.pages) == 2


def test_hits_are_not_evicted_to_make_room_for_the_rest():
    manager = make_manager(3)
    first, _ = admit(manager, TOKENS)
    manager.publish(first, 12)
    manager.release(first)
    seq, num_hits = admit(manager, TOKENS)
    assert num_hits == 8
    assert len(set(seq.pages)) == 3
    manager.check_integrity([seq])


def test_free_hits_count_as_pages_to_take():
    manager = make_manager(3)
    first, _ = admit(manager, TOKENS[:8])
    manager.publish(first, 8)
    manager.release(first)
    longer = make_seq(list(range(10, 26)))  # two hits + two new, three pages in all
    assert manager.admit(longer, num_tokens=16, max_hit_tokens=15, num_spare_pages=0) is None
    assert longer.pages == []
    manager.check_integrity([])
    assert admit(manager, TOKENS)[1] == 8


def test_spare_pages_are_left_over():
    manager = make_manager(4)
    seq = make_seq(TOKENS)
    assert manager.admit(seq, num_tokens=12, max_hit_tokens=11, num_spare_pages=2) is None
    assert manager.admit(seq, num_tokens=12, max_hit_tokens=11, num_spare_pages=1) == 0


def test_growth():
    manager = make_manager(4)
    seq, _ = admit(manager, TOKENS[:7])
    assert not manager.grow(seq, 8)
    assert manager.grow(seq, 9) == seq.pages[2:]
    assert manager.grow(seq, 17) is None
    assert len(seq.pages) == 3
    assert len(manager.grow(seq, 16) or ()) == 1
    manager.check_integrity([seq])


def test_equal_pages_computed_at_once():
    manager = make_manager()
    first, _ = admit(manager, TOKENS)
    second, _ = admit(manager, TOKENS)
    manager.publish(first, 12)
    manager.publish(second, 12)
    manager.release(first)
    manager.release(second)
    manager.check_integrity([])
    third, num_hits = admit(manager, [*TOKENS, 1])
    assert num_hits == 12
    assert len(third.pages) == 4


def test_discarded_content_is_not_found():
    manager = make_manager()
    first, _ = admit(manager, TOKENS)
    manager.publish(first, 12)
    manager.discard(first)
    manager.check_integrity([])
    assert admit(manager, TOKENS)[1] == 0


def test_reset_forgets_also_what_running_sequences_still_publish():
    manager = make_manager()
    first, _ = admit(manager, TOKENS)
    manager.publish(first, 4)
    manager.reset_prefix_cache()
    manager.publish(first, 12)
    second, num_hits = admit(manager, TOKENS)
    assert num_hits == 0
    manager.publish(second, 12)
    third, num_hits = admit(manager, [*TOKENS, 1])
    assert num_hits == 12
    assert third.pages[:3] == second.pages
    manager.check_integrity([first, second, third])


def test_integrity_notices_a_lost_page():
    manager = make_manager()
    seq, _ = admit(manager, TOKENS)
    with pytest.raises(AssertionError, match="reference counts"):
        manager.check_integrity([])
    seq.pages.append(seq.pages[0])
    with pytest.raises(AssertionError, match="twice"):
        manager.check_integrity([seq])
