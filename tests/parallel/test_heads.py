"""Head layouts: whatever the numbers, every head of the model is there once, beside its KV head."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.parallel.heads import plan_heads


@given(
    num_kv_heads=st.integers(1, 16), group=st.integers(1, 12), tensor=st.sampled_from([1, 2, 4, 8])
)
def test_any_layout_holds_the_models_heads(num_kv_heads: int, group: int, tensor: int):
    num_heads = num_kv_heads * group
    layout = plan_heads(num_heads=num_heads, num_kv_heads=num_kv_heads, tensor=tensor)
    assert layout.num_kv_heads % tensor == 0
    assert len(layout.kv_source) == len(layout.query_source) == layout.num_kv_heads
    assert {len(queries) for queries in layout.query_source} == {layout.queries_per_kv}
    placed = sorted(head for queries in layout.query_source for head in queries if head >= 0)
    assert placed == list(range(num_heads))
    for kv_head, queries in zip(layout.kv_source, layout.query_source, strict=True):
        assert {head // group for head in queries if head >= 0} <= {kv_head}
    # No device holds more KV heads, which are cache memory, than it must.
    assert layout.num_kv_heads // tensor == -(-num_kv_heads // tensor)


@given(num_kv_heads=st.integers(1, 8), group=st.integers(1, 8), tensor=st.sampled_from([1, 2, 4]))
def test_heads_that_divide_stay_as_they_are(num_kv_heads: int, group: int, tensor: int):
    num_kv_heads *= tensor
    layout = plan_heads(num_heads=num_kv_heads * group, num_kv_heads=num_kv_heads, tensor=tensor)
    assert layout.kv_source == tuple(range(num_kv_heads))
    assert layout.queries_per_kv == group
    assert [head for queries in layout.query_source for head in queries] == list(
        range(num_kv_heads * group)
    )


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "tensor", "kv_source", "queries_per_kv"),
    [
        (9, 3, 2, (0, 1, 2, -1), 3),  # SmolLM2-135M: one dummy
        (8, 1, 4, (0, 0, 0, 0), 2),  # one KV head: everywhere, each with its part of the queries
        (32, 8, 16, tuple(head for head in range(8) for _ in range(2)), 2),
        (6, 2, 4, (0, 0, 1, 1), 2),  # groups of 3 in two parts: one dummy query in each second
    ],
)
def test_known_layouts(
    num_heads: int,
    num_kv_heads: int,
    tensor: int,
    kv_source: tuple[int, ...],
    queries_per_kv: int,
):
    layout = plan_heads(num_heads=num_heads, num_kv_heads=num_kv_heads, tensor=tensor)
    assert (layout.kv_source, layout.queries_per_kv) == (kv_source, queries_per_kv)
