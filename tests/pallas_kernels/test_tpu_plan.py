"""What the TPU kernels are told: block sizes from the device table, and lists of work."""

from dataclasses import replace
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.devices import TPUS, TpuSpec
from pallas_kernels.dispatch import choose_kernels
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.api import AttentionSpec, StepLayout, locate_tokens
from pallas_kernels.paged_attention.tpu_work import (
    ItemField,
    WriteField,
    chunk_items,
    chunk_writes,
    decode_items,
    table_chunks,
)
from pallas_kernels.paged_attention.tuning import (
    SMALLEST_QUERY_BLOCK,
    AttentionShape,
    best_page_size,
    choose_blocks,
    refusal,
    vmem_bytes,
)
from tests.pallas_kernels.ragged import Sequence, Shapes, make_step, sequences

SHAPE = AttentionShape(
    num_kv_heads=8,
    group=4,
    head_dim=128,
    query_dtype="bfloat16",
    page_dtype="bfloat16",
    page_size=32,
)
DEVICES = sorted({spec.name: spec for spec in TPUS.values()}.values(), key=lambda spec: spec.name)


def shapes_of_models() -> list[AttentionShape]:
    heads = [(1, 8), (1, 64), (2, 4), (8, 4), (8, 8), (32, 1)]
    sizes = product(heads, (64, 128, 256), (16, 32, 128, 256), ("bfloat16", "int8", "float32"))
    shapes = [
        replace(SHAPE, num_kv_heads=k, group=g, head_dim=h, page_size=b, page_dtype=dtype)
        for (k, g), h, b, dtype in sizes
    ]
    return [shape for shape in shapes if refusal(shape) is None]


@pytest.mark.parametrize("device", DEVICES, ids=lambda spec: spec.name)
def test_blocks_fit_the_device(device: TpuSpec):
    for shape in shapes_of_models():
        blocks = choose_blocks(device, shape)
        if blocks is None:  # more heads and longer pages than the smallest memory has room for
            widest = shape.num_kv_heads * max(shape.head_dim, shape.page_size)
            assert device.name == "v4" and widest >= 2048
            continue
        needed = vmem_bytes(shape, blocks)
        assert needed <= blocks.vmem_limit_bytes <= device.vmem_bytes, (shape, blocks)
        for size in (blocks.num_buffers, blocks.pages_per_block, blocks.query_block):
            assert size & (size - 1) == 0
        assert blocks.query_block >= SMALLEST_QUERY_BLOCK
        assert blocks.num_buffers >= 2


@pytest.mark.parametrize("device", DEVICES, ids=lambda spec: spec.name)
def test_the_ring_covers_the_latency_of_memory(device: TpuSpec):
    """On every device whose VMEM is not the limit; v4 has 16 MiB."""
    blocks = choose_blocks(device, SHAPE)
    assert blocks is not None
    ahead = (blocks.num_buffers - 1) * blocks.pages_per_block * SHAPE.page_size * SHAPE.key_bytes
    assert ahead >= device.hbm_bytes_per_s / device.num_cores * device.dma_latency_s
    if device.name != "v4":
        rows = blocks.query_block * SHAPE.group
        ridge = device.flops_bf16_per_s / device.hbm_bytes_per_s
        assert rows >= min(ridge, 128 * SHAPE.group)


def test_small_keys_get_larger_pages():
    one_head = replace(SHAPE, num_kv_heads=1)
    assert best_page_size(TPUS["TPU v6 lite"], SHAPE) < best_page_size(
        TPUS["TPU v6 lite"], one_head
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 80}, "head size 80"),
        ({"query_dtype": "float16"}, "float16"),
        ({"page_dtype": "float16"}, "pages are float16"),
        ({"page_dtype": "int8", "page_size": 16}, "pages of 16 tokens"),
    ],
)
def test_what_is_not_covered_is_left_to_xla(change: dict[str, object], words: str):
    shape = replace(SHAPE, **change)  # pyright: ignore[reportArgumentType]
    kernels = choose_kernels(platform="tpu", device_kind="TPU v6 lite", attention_shape=shape)
    assert kernels.paged_attention is xla.paged_attention
    assert kernels.plan_attention is xla.plan
    assert words in kernels.reasons[0]


@pytest.mark.parametrize("kind", TPUS)
def test_every_known_device_gets_the_kernel(kind: str):
    kernels = choose_kernels(platform="tpu", device_kind=kind, attention_shape=SHAPE)
    assert kernels.paged_attention is not xla.paged_attention
    assert "Pallas" in kernels.reasons[0]


def test_an_unknown_device_is_named():
    kernels = choose_kernels(platform="tpu", device_kind="TPU v99", attention_shape=SHAPE)
    assert kernels.paged_attention is xla.paged_attention
    assert "TPU v99" in kernels.reasons[0]


SHAPES = Shapes(T=90, S=7, K=1, G=1, H=64, B=16, M=9, P=70, dtype="float32")


def layout_of(found: list[Sequence]) -> StepLayout:
    layout = make_step(found, SHAPES, AttentionSpec(scale=1.0), seed=3).layout
    return jax.tree.map(jnp.asarray, layout)


def table(fields: jax.Array, count: int) -> np.ndarray:
    return np.asarray(fields).reshape(count, -1).T


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_chunks_and_writes_cover_every_token_once(data: st.DataObject):
    found = data.draw(sequences(SHAPES, decode_only=False))
    cores = data.draw(st.sampled_from([1, 2, 4]))
    layout, block, rows = layout_of(found), 16, 8
    items = chunk_items(layout, num_tokens=SHAPES.T, query_block=block, num_cores=cores)
    writes = chunk_writes(
        layout, num_tokens=SHAPES.T, page_size=SHAPES.B, rows=rows, num_cores=cores
    )
    starts, begins = np.asarray(layout.starts_S), np.asarray(layout.query_starts_S1)
    expected = {
        (seq, token, int(starts[seq] + token - begins[seq]))
        for seq, (_, num_new) in enumerate(found)
        for token in range(begins[seq], begins[seq + 1])
        if num_new > 1
    }
    seq_of_slot = {int(slot): seq for seq, slot in enumerate(np.asarray(layout.slots_S))}
    bounds = np.asarray(items.bounds)
    assert bounds[0] == 0 and (np.diff(bounds) >= 0).all()
    todo, attended = table(items.fields, ItemField.COUNT), set()
    for item in todo[: bounds[-1]]:
        for x in range(item[ItemField.FIRST], item[ItemField.END]):
            token = item[ItemField.BLOCK] * block + x
            key = (seq_of_slot[item[ItemField.SLOT]], token, item[ItemField.POSITION] + x)
            assert key not in attended
            attended.add(key)
    assert attended == expected
    blocks_of_cores = [set(todo[first:last, ItemField.BLOCK]) for first, last in pairwise(bounds)]
    assert sum(map(len, blocks_of_cores)) == len(set().union(*blocks_of_cores))

    table_RM, written = np.asarray(layout.page_table_RM), set()
    for write in table(writes.fields, WriteField.COUNT)[: np.asarray(writes.bounds)[-1]]:
        for row in range(write[WriteField.FIRST], write[WriteField.END]):
            token = write[WriteField.TOKEN] + row
            seq = int(np.searchsorted(begins, token, side="right")) - 1
            position = int(starts[seq] + token - begins[seq])
            slot = np.asarray(layout.slots_S)[seq]
            assert table_RM[slot, position // SHAPES.B] == write[WriteField.PAGE]
            assert write[WriteField.ROW_BLOCK] * rows + row == position % SHAPES.B
            assert (seq, token, position) not in written
            written.add((seq, token, position))
    assert written == expected


@pytest.mark.parametrize("cores", [1, 2])
def test_decodes_are_shared_by_keys(cores: int):
    found = [Sequence(100, 1), Sequence(3, 1), Sequence(3, 1), Sequence(90, 1), Sequence(0, 5)]
    layout = layout_of(found)
    places = locate_tokens(layout, num_tokens=SHAPES.T, num_pages=SHAPES.P, page_size=SHAPES.B)
    items = decode_items(layout, places, num_cores=cores)
    assert np.asarray(items.bounds).tolist() == ([0, 4] if cores == 1 else [0, 1, 4])
    fields = table(items.fields, ItemField.COUNT)
    assert fields[:4, ItemField.POSITION].tolist() == [100, 3, 3, 90]
    page_T = np.asarray(places.page_T)
    assert fields[:4, ItemField.PAGE].tolist() == page_T[:4].tolist()


def test_a_page_table_is_cut_in_order():
    table_RM = jnp.arange(3 * 300, dtype=jnp.int32).reshape(3, 300)
    chunks = np.asarray(table_chunks(table_RM))
    assert chunks.shape == (3, 3, 1, 128)
    assert chunks[2, 1, 0, 5] == 2 * 300 + 128 + 5
