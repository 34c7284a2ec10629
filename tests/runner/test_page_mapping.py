"""Memory that is mapped behind the engine's back: all of it, and nothing in it changes."""

import ctypes
import mmap
import os
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.core.limits import EngineLimits
from jaxinfer.models.registry import define_model
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.runner import abstract, page_mapping
from jaxinfer.runner.page_mapping import Range, map_in_background
from jaxinfer.weights.reader import open_checkpoint
from pallas_kernels.dispatch import choose_kernels
from tests.runner.tiny_llama import TinyLlama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
SIZE = 64 * 2**20 + 4096  # not a multiple of a piece


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def can_populate() -> bool:
    with mmap.mmap(-1, 4096) as memory:
        before = resident_bytes()
        libc = ctypes.CDLL(None)
        address = ctypes.c_void_p(address_of(memory))
        return before > 0 and libc.madvise(address, ctypes.c_size_t(4096), 23) == 0


def test_all_is_mapped_and_stays_as_it_is():
    if not can_populate():
        pytest.skip("this kernel has no MADV_POPULATE_WRITE (Linux 5.14)")
    with mmap.mmap(-1, SIZE) as memory:
        memory[5000:5003] = b"abc"
        before = resident_bytes()
        page_mapping._map_all([Range(address_of(memory), SIZE)])
        assert resident_bytes() - before > 0.9 * SIZE
        assert memory[5000:5003] == b"abc"
        assert memory[SIZE - 4096 :] == bytes(4096)


def test_memory_that_is_gone_ends_the_work():
    memory = mmap.mmap(-1, SIZE)
    address = address_of(memory)
    memory.close()
    page_mapping._map_all([Range(address, SIZE), Range(0, SIZE)])


def test_arrays_keep_their_values():
    arrays = [jnp.arange(300_000, dtype=jnp.float32) + k for k in range(3)]
    thread = map_in_background(arrays)
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()
    for k, array in enumerate(arrays):
        np.testing.assert_array_equal(array, np.arange(300_000, dtype=np.float32) + k)


@pytest.mark.parametrize("are_unmapped", [True, False])
def test_pages_that_nothing_has_touched_are_mapped(
    are_unmapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mapped: list[jax.Array] = []
    monkeypatch.setattr(abstract, "map_in_background", mapped.extend)
    reader = open_checkpoint(TinyLlama().save(tmp_path))
    definition = define_model(reader.config(), tensor=1)
    mesh = make_mesh(tensor=1, devices=jax.devices())
    kernels = choose_kernels(platform="cpu")
    if are_unmapped:
        kernels = replace(kernels, empty_pages=lambda shape, dtype: jnp.ones(shape, dtype))
    model = abstract.make_abstract(definition, mesh, kernels, dtype="float32")
    limits = EngineLimits(
        max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32, page_size=8, num_pages=6
    )
    shapes = abstract.abstract_arrays(model, limits, kv_cache_dtype="float32")
    memory = abstract.make_allocator(model, limits, shapes)()
    assert len(memory.pages_L) == definition.shape.num_layers
    assert mapped == (list(memory.pages_L) if are_unmapped else [])
