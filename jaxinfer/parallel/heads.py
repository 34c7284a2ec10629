"""How attention heads are laid out over the tensor axis when they do not divide it. Pure data.

The engine computes with K' KV heads of G' query heads each, K' a multiple of the tensor size.
When the model's K does not divide, KV heads are repeated (each copy serves a part of its query
heads) and dummy heads of zero weights are added; their output is multiplied by zero rows of the
output projection, so results are unchanged.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """The engine's heads in terms of the model's."""

    num_kv_heads: int  # K'
    queries_per_kv: int  # G'
    kv_source: tuple[int, ...]  # [K'] the model's KV head, -1 for a dummy
    query_source: tuple[tuple[int, ...], ...]  # [K'][G'] the model's query head, -1 for a dummy


def plan_heads(*, num_heads: int, num_kv_heads: int, tensor: int) -> HeadLayout:
    """The cheapest layout for `tensor` devices: fewest KV heads per device, then query heads.

    `copies` of each KV head split its group of query heads into as many parts. KV heads weigh
    more, since each is cache memory and bandwidth for every token of every sequence.
    """
    group = num_heads // num_kv_heads

    def cost(copies: int) -> tuple[int, int, int]:
        per_device = -(-num_kv_heads * copies // tensor)
        return per_device, per_device * -(-group // copies), copies

    copies = min(range(1, group + 1), key=cost)
    part = -(-group // copies)
    kv_source: list[int] = []
    query_source: list[tuple[int, ...]] = []
    for kv_head in range(num_kv_heads):
        queries = list(range(kv_head * group, (kv_head + 1) * group))
        for copy in range(copies):
            own = queries[copy * part : (copy + 1) * part]
            kv_source.append(kv_head)
            query_source.append(tuple(own + [-1] * (part - len(own))))
    padding = -len(kv_source) % tensor
    kv_source += [-1] * padding
    query_source += [(-1,) * part] * padding
    return HeadLayout(
        num_kv_heads=len(kv_source),
        queries_per_kv=part,
        kv_source=tuple(kv_source),
        query_source=tuple(query_source),
    )
