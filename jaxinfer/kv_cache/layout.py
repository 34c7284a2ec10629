"""How many bytes and pages a KV cache has. Arithmetic only: no arrays, no allocation.

Per layer the cache is one array [num_pages, num_kv_heads, page_size, 2 * head_dim]; the last
dimension holds K, then V.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PAGE_DTYPES: Mapping[str, str] = MappingProxyType(
    {"int8": "int8", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
)
"""--kv-cache-dtype -> dtype of values that are stored divided by a scale."""


def page_dtype(kv_cache_dtype: str) -> str:
    """The dtype that pages hold, of a resolved --kv-cache-dtype."""
    return PAGE_DTYPES.get(kv_cache_dtype, kv_cache_dtype)


def has_scales(kv_cache_dtype: str) -> bool:
    """Whether a layer needs scales for its pages."""
    return kv_cache_dtype in PAGE_DTYPES


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
