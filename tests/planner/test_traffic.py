"""What a program moves, from short programs in XLA's syntax and from one that XLA made."""

import jax
import jax.numpy as jnp

from jaxinfer.planner.traffic import traffic_of

PAGES = (8, 2, 16, 128)
ROW = 4 * 256  # bytes of f32[256]


def program(*lines: str, others: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule step\n{others}\nENTRY %main (x: f32[256]) -> f32[256] {{\n{body}\n}}\n"


def moved(*lines: str, others: str = "") -> int:
    return traffic_of(program(*lines, others=others), pages=PAGES).num_bytes


X = "%x = f32[256]{0:T(256)} parameter(0)"


def test_an_operation_moves_its_operands_and_results() -> None:
    assert moved(X, "ROOT %y = f32[256]{0:T(256)} add(%x, %x)") == 2 * ROW


def test_what_lies_on_the_chip_is_not_moved() -> None:
    assert moved(
        X,
        "%y = f32[256]{0:T(256)S(1)} negate(%x)",
        "%z = f32[256]{0:T(256)S(1)} negate(%y)",
        "ROOT %b = f32[256]{0:T(256)} bitcast(%z)",
    ) == ROW  # fmt: skip


def test_a_prefetch_moves_what_it_brings() -> None:
    big = "%x = f32[1024]{0} parameter(0)"
    start = "%s = ((f32[1024]{0}), f32[256]{0:S(1)}, s32[]{:S(2)}) slice-start(%x)"
    assert moved(big, start, "ROOT %d = f32[256]{0:S(1)} slice-done(%s)") == ROW
    copy = "%c = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%x)"
    assert moved(X, copy, "ROOT %d = f32[256]{0:S(1)} copy-done(%c)") == ROW
    # Of two programs that run in turn, the one before has brought it.
    assert moved(X, f"{copy}, cross_program_prefetch_index=0") == 0


FUSED = """
%gathers (p: f32[4096,256], i: s32[2]) -> f32[2,256] {
  %p = f32[4096,256]{1,0} parameter(0)
  %i = s32[2]{0} parameter(1)
  %b = f32[4096,256]{1,0} bitcast(%p)
  ROOT %g = f32[2,256]{1,0} gather(%b, %i), slice_sizes={1,256}
}

%updates (p: f32[4096,256], u: f32[1,256], i: s32[]) -> f32[4096,256] {
  %p = f32[4096,256]{1,0} parameter(0)
  %u = f32[1,256]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[4096,256]{1,0} dynamic-update-slice(%p, %u, %i, %i)
}
"""
TABLE = "%t = f32[4096,256]{1,0} parameter(0)"


def test_of_a_table_the_rows_that_are_looked_up() -> None:
    indices = "%i = s32[2]{0:S(1)} parameter(1)"
    fusion = "ROOT %f = f32[2,256]{1,0} fusion(%t, %i), kind=kCustom, calls=%gathers"
    assert moved(TABLE, indices, fusion, others=FUSED) == 4 * ROW
    assert moved(TABLE, indices, "ROOT %f = f32[2,256]{1,0} gather(%t, %i)") == 4 * ROW


CUTS = """
%cuts (p: f32[8,4,256]) -> f32[8,1,256] {
  %p = f32[8,4,256]{2,1,0} parameter(0)
  %n = f32[8,4,256]{2,1,0} negate(%p)
  %low = f32[8,1,256]{2,1,0} slice(%n), slice={[0:8], [0:1], [0:256]}
  %high = f32[8,1,256]{2,1,0} slice(%n), slice={[0:8], [3:4], [0:256]}
  ROOT %s = f32[8,1,256]{2,1,0} add(%low, %high)
}

%spreads (p: f32[8,256]) -> f32[8,4,256] {
  %p = f32[8,256]{1,0} parameter(0)
  %b = f32[8,4,256]{2,1,0} broadcast(%p), dimensions={0,2}
  ROOT %c = f32[8,4,256]{2,1,0} copy(%b)
}

%narrows (p: f32[8,4,256]) -> bf16[8,4,256] {
  %p = f32[8,4,256]{2,1,0} parameter(0)
  ROOT %c = bf16[8,4,256]{2,1,0} convert(%p)
}

%turns (p: f32[8,1,4,256], w: f32[256,256,1,1]) -> f32[8,1,3,256] {
  %p = f32[8,1,4,256]{3,2,1,0} parameter(0)
  %w = f32[256,256,1,1]{3,2,1,0} parameter(1)
  ROOT %y = f32[8,1,3,256] convolution(%p, %w), window={pad=0_0x0_-1}, dim_labels=b01f_io01->b01f
}

%contracts (p: f32[8,256]) -> f32[8,1] {
  %p = f32[8,256]{1,0} parameter(0)
  %all = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %s = f32[8,1]{1,0} slice(%all), slice={[0:8], [0:1]}
}
"""


def test_a_fusion_reads_what_its_results_need() -> None:
    four = "%x = f32[8,4,256]{2,1,0} parameter(0)"
    cut = "ROOT %f = f32[8,1,256]{2,1,0} fusion(%x), kind=kLoop, calls=%cuts"
    assert moved(four, cut, others=CUTS) == (2 + 1) * 8 * ROW
    one = "%x = f32[8,256]{1,0} parameter(0)"
    spread = "ROOT %f = f32[8,4,256]{2,1,0} fusion(%x), kind=kLoop, calls=%spreads"
    assert moved(one, spread, others=CUTS) == (1 + 4) * 8 * ROW
    narrow = "ROOT %f = bf16[8,4,256]{2,1,0} fusion(%x), kind=kLoop, calls=%narrows"
    assert moved(four, narrow, others=CUTS) == (4 + 2) * 8 * ROW
    contract = "ROOT %f = f32[8,1]{1,0} fusion(%x), kind=kOutput, calls=%contracts"
    assert moved(one, contract, others=CUTS) == 8 * ROW + 8 * 4


def test_a_convolution_does_not_read_what_its_padding_cuts() -> None:
    x = "%x = f32[8,1,4,256]{3,2,1,0} parameter(0)"
    weights = "%w = f32[256,256,1,1]{3,2,1,0:S(1)} parameter(1)"
    turn = "ROOT %f = f32[8,1,3,256]{3,2,1,0} fusion(%x, %w), kind=kOutput, calls=%turns"
    assert moved(x, weights, turn, others=CUTS) == (3 + 3) * 8 * ROW


def test_of_an_update_in_place_what_is_written() -> None:
    operands = "%u = f32[1,256]{1,0:S(1)} parameter(1)", "%i = s32[]{:S(6)} parameter(2)"
    fusion = "ROOT %f = f32[4096,256]{1,0} fusion(%t, %u, %i), kind=kLoop, calls=%updates"
    assert moved(TABLE, *operands, fusion, others=FUSED) == 2 * ROW


CONTROL = """
%cheap (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  ROOT %n = f32[256]{0} negate(%a)
}

%dear (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  %n = f32[256]{0} negate(%a)
  ROOT %m = f32[256]{0} negate(%n)
}
"""


def test_a_branch_counts_as_the_cheaper_and_a_loop_as_often_as_it_runs() -> None:
    flag = "%c = s32[] parameter(1)"
    either = "ROOT %y = f32[256]{0} conditional(%c, %x, %x), branch_computations={%dear, %cheap}"
    assert moved(X, flag, either, others=CONTROL) == 2 * ROW
    of_gpus = either.replace(
        "branch_computations={%dear, %cheap}",
        "true_computation=%dear, false_computation=%cheap, metadata={}",
    )
    assert moved(X, "%c = pred[] parameter(1)", of_gpus, others=CONTROL) == 2 * ROW
    loop = "ROOT %y = f32[256]{0} while(%x), condition=%c, body=%dear"
    assert moved(X, loop, others=CONTROL) == 4 * ROW
    known = f'{loop}, backend_config={{"known_trip_count":{{"n":"5"}}}}'
    assert moved(X, known, others=CONTROL) == 20 * ROW


def test_what_was_written_just_now_is_read_from_the_cache() -> None:
    chain = (
        X,
        "%w = f32[1024]{0} parameter(1)",
        "%y = f32[256]{0} negate(%x)",
        "%v = f32[256]{0} bitcast(%y)",
        "%z = f32[256]{0} negate(%v)",
        "%s = f32[8]{0} reduce(%w)",
        "ROOT %o = f32[256]{0} add(%y, %x)",
    )
    text, small = program(*chain), 32
    least = (1 + 1) * ROW + ROW + (4 * ROW + small) + (1 + 1) * ROW  # y, z, s, o without y
    for cache_bytes, near_rows in ((0, 0), (4 * ROW - 1, 0), (4 * ROW, 1), (20 * ROW, 1)):
        traffic = traffic_of(text, pages=PAGES, cache_bytes=cache_bytes)
        assert traffic.near_bytes == near_rows * ROW
        assert traffic.num_bytes == least + (2 - near_rows) * ROW
    # So does a branch.
    branch = chain[2], "%t = (f32[256]{0}) tuple(%y)", "%c = s32[] parameter(1)"
    choice = "ROOT %o = f32[256]{0} conditional(%c, %t, %t), branch_computations={%one, %one}"
    one = (
        "%one (a: (f32[256])) -> f32[256] {\n  %a = (f32[256]{0}) parameter(0)\n"
        "  %e = f32[256]{0} get-tuple-element(%a), index=0\n  ROOT %n = f32[256]{0} negate(%e)\n}\n"
    )
    chosen = program(X, *branch, choice, others=one)
    for cache_bytes, near in ((4 * ROW - 1, 0), (4 * ROW, ROW)):
        assert traffic_of(chosen, pages=PAGES, cache_bytes=cache_bytes).near_bytes == near
    # A kernel that reads pages leaves nothing.
    pages = "%p = bf16[8,2,16,128]{3,2,1,0} parameter(1)"
    kernel = "%k = f32[8]{0} custom-call(%p)"
    behind = program(X, pages, chain[2], kernel, "ROOT %o = f32[256]{0} negate(%y)")
    assert traffic_of(behind, pages=PAGES, cache_bytes=20 * ROW).near_bytes == 0
    # From before y was written to its second reading 6 rows and s were moved.
    far = 4 * (6 * ROW + small)
    assert traffic_of(text, pages=PAGES, cache_bytes=far - 1).near_bytes == ROW
    assert traffic_of(text, pages=PAGES, cache_bytes=far).near_bytes == 2 * ROW


def test_pages_are_the_kernels_and_nobody_elses() -> None:
    pages = "%p = bf16[8,2,16,128]{3,2,1,0} parameter(0)"
    kernel = "%k = bf16[8,2,16,128]{3,2,1,0} custom-call(%p)"
    only_kernel = traffic_of(program(pages, kernel), pages=PAGES)
    assert (only_kernel.num_bytes, only_kernel.page_bytes) == (0, 0)
    view = "%v = bf16[16,16,128]{2,1,0} bitcast(%p)"
    seen_as = "ROOT %k = f32[8]{0} custom-call(%v)"
    viewed = traffic_of(program(pages, view, seen_as), pages=PAGES)
    assert (viewed.num_bytes, viewed.page_bytes) == (32, 0)
    copied = traffic_of(
        program(pages, kernel, "ROOT %c = bf16[8,2,16,128]{3,2,1,0} copy(%k)"), pages=PAGES
    )
    assert (copied.num_bytes, copied.page_bytes) == (0, 2 * 2 * 8 * 2 * 16 * 128)


def test_the_largest_come_first_with_their_place() -> None:
    traffic = traffic_of(
        program(
            X,
            '%y = f32[256]{0} negate(%x), metadata={op_name="jit(step)/mlp"}',
            "%z = f32[8]{0} slice(%y)",
        ),
        pages=PAGES,
    )
    assert [item.num_bytes for item in traffic.largest] == [2 * ROW, 64]
    assert traffic.largest[0].where == "jit(step)/mlp"


def test_a_program_of_xla() -> None:
    def step(weights_DF: jax.Array, x_TD: jax.Array) -> jax.Array:
        return jnp.tanh(x_TD @ weights_DF)

    weights, x = jnp.zeros((64, 32)), jnp.zeros((8, 64))
    text = jax.jit(step).lower(weights, x).compile().as_text()
    assert text is not None
    least = 4 * (64 * 32 + 8 * 64 + 8 * 32)
    assert least <= traffic_of(text, pages=PAGES).num_bytes <= least + 2 * 2 * 4 * 8 * 32
