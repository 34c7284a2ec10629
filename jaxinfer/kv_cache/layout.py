"""How many bytes and pages a KV cache has. Arithmetic only: no arrays, no allocation.

Per layer the cache is one array [num_pages, num_kv_heads, page_size, 2 * head_dim]; the last
dimension holds K, then V.
"""

from dataclasses import dataclass


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Shape of the KV cache on one device (`num_kv_heads` is the device's share)."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int
    page_size: int

    @property
    def bytes_per_page(self) -> int:
        """Of one page in all layers, K and V."""
        return self.page_size * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.num_kv_heads * 2 * self.head_dim * self.dtype_bytes
