"""Has the system map the memory of a CPU's KV pages while the engine serves already.

Mapping costs some 4 us for each 4 KiB, more where a hypervisor must find the memory first: seconds
of a start for a cache of 2 GiB. Left to the steps, it would make the process grow for as long as
there are pages that no request has used, and memory that another process has taken meanwhile would
be missed in the middle of a request. Knows addresses; nothing of what is stored there.
"""

import ctypes
import errno
import os
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxinfer.logging import get_logger

logger = get_logger(__name__)

_MADV_POPULATE_WRITE = 23  # Linux 5.14, asm-generic/mman-common.h: maps, and changes no contents
_PIECE_BYTES = 2**20  # mapped at a time: who wants to map something else waits for one piece


class Range(NamedTuple):
    """Of memory, in bytes."""

    address: int
    num_bytes: int


def map_in_background(arrays: Sequence[jax.Array]) -> threading.Thread | None:
    """Starts to map the memory of arrays on CPU devices; None where the system cannot.

    Their contents stay what they are, whoever writes meanwhile. The arrays may be donated or freed
    before it is done: the thread ends at the first address that is nobody's any more.
    """
    if sys.platform != "linux":
        return None
    ranges = [
        Range(shard.data.unsafe_buffer_pointer(), shard.data.nbytes)
        for array in arrays
        for shard in array.addressable_shards
    ]
    thread = threading.Thread(target=_map_all, args=(ranges,), name="map-pages", daemon=True)
    thread.start()
    return thread


def _map_all(ranges: Sequence[Range]) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page_bytes = os.sysconf("SC_PAGESIZE")
    for address, num_bytes in ranges:
        end = address + num_bytes
        for begin in range(address - address % page_bytes, end, _PIECE_BYTES):
            size = min(_PIECE_BYTES, end - begin)
            if madvise(begin, size, _MADV_POPULATE_WRITE) != 0:
                reason = errno.errorcode.get(ctypes.get_errno(), "?")
                logger.debug("KV pages are mapped when they are used (%s)", reason)
                return
