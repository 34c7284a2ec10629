"""Bytes and pages of the KV cache."""

import pytest

from jaxinfer.kv_cache.layout import KVLayout, num_pages_for


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_are_rounded_up(tokens, pages):
    assert num_pages_for(tokens, 16) == pages


def test_bytes_of_smollm2():
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, dtype_bytes=2, page_size=16)
    assert layout.bytes_per_token == 30 * 3 * 64 * 2 * 2
    assert layout.bytes_per_page == 16 * layout.bytes_per_token
