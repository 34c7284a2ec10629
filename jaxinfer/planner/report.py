"""A PlanResult as text for a terminal. Knows no arithmetic and imports no JAX."""

from collections.abc import Iterator, Sequence

from jaxinfer.planner.messages import Alternative, PlanResult, ProgramRow

_MIB, _GIB = 2**20, 2**30


def describe(result: PlanResult) -> str:
    """The whole answer, the yes or no first."""
    return "\n".join(_lines(result))


def _lines(result: PlanResult) -> Iterator[str]:
    verdict = "fits" if result.fits else "does NOT fit"
    yield (
        f"{result.model} {verdict} on {result.topology}: {result.num_devices} device(s), "
        f"--tensor-parallel-size {result.tensor_parallel_size}, --dtype {result.dtype}, "
        f"--kv-cache-dtype {result.kv_cache_dtype}, --max-model-len {result.max_model_len}, "
        f"--max-num-seqs {result.max_num_seqs}, "
        f"--max-num-batched-tokens {result.max_num_batched_tokens}"
    )
    yield from (f"  kernel {reason}" for reason in result.kernels)
    if result.why_not:
        yield from ("", result.why_not)
    sections = (_memory, _concurrency, _programs, _decode, _prefill, _layouts, _alternatives)
    for section in sections:
        lines = list(section(result))
        if lines:
            yield from ("", *lines)
    for title, entries in (("Assumptions", result.assumptions), ("Notes", result.notes)):
        if entries:
            yield from ("", f"{title}:", *(f"  - {entry}" for entry in entries))
    yield from ("", f"planned in {result.wall_s:.1f} s")


def _memory(result: PlanResult) -> Iterator[str]:
    memory = result.memory
    if not result.fits:
        return  # the table stands in `why_not`
    source = "kept for temporaries"
    if result.programs:
        needed = max(row.temp_bytes for row in result.programs)
        source += f"; XLA needs {_size(needed)}"
    tokens = memory.num_pages * memory.page_size
    rows = [
        ("weights", memory.weight_bytes, ""),
        ("slot state", memory.state_bytes, ""),
        ("largest step", memory.step_bytes, source),
        (
            "KV cache",
            memory.kv_bytes,
            f"{memory.num_pages} pages of {memory.page_size} = {tokens} tokens; {memory.kv_reason}",
        ),
        ("total", memory.total_bytes, f"of {_size(memory.usable_bytes)} usable"),
    ]
    if result.code_bytes is not None:
        rows.append(("code", result.code_bytes, "of all programs"))
    if result.padding_bytes is not None and result.padding_bytes >= _MIB:
        rows.append(("padding", result.padding_bytes, "of arrays, by the compiler"))
    if result.needed_bytes is not None:
        of_device = f"of {_size(memory.device_bytes)}, with what XLA needs for the largest step"
        rows.append(("all of it", result.needed_bytes, of_device))
    yield "Memory of each device:"
    yield from _table([(name, _size(size), note) for name, size, note in rows])


def _concurrency(result: PlanResult) -> Iterator[str]:
    if result.concurrency:
        yield "Sequences that the pages hold at once:"
        yield from _table(
            [(f"{row.num_tokens} tokens", f"{row.num_seqs:.1f}") for row in result.concurrency]
        )


def _programs(result: PlanResult) -> Iterator[str]:
    if not result.programs:
        return
    yield "Largest steps, compiled:"
    header = ("step", "temp", "code", "moved, no pages", "GFLOP", "collectives", "compiled in")
    yield from _table(
        [
            header,
            *(
                (
                    row.name,
                    _size(row.temp_bytes),
                    _size(row.code_bytes),
                    _size(row.moved_bytes) if row.moved_bytes else "not said",
                    f"{row.flops / 1e9:.0f}" if row.flops else "not said",
                    _collectives(row),
                    f"{row.trace_s + row.compile_s:.0f} s",
                )
                for row in result.programs
            ),
        ]
    )


def _collectives(row: ProgramRow) -> str:
    parts = [
        f"{item.count} {item.kind} ({_size(item.num_bytes)})"
        + ("" if item.always else " if wanted")
        for item in row.collectives
    ]
    return ", ".join(parts) or "none"


def _decode(result: PlanResult) -> Iterator[str]:
    if not result.decode:
        return
    yield f"Decoding at best (roofline), sequences of {result.decode[0].context} tokens:"
    has_price = result.decode[0].price_per_million is not None
    header = ["batch", "step", "bound by", "tokens/s", "with prompts", *["per 1M"] * has_price]
    yield from _table(
        [
            header,
            *(
                [
                    str(row.batch),
                    f"{row.step_s * 1e3:.2f} ms",
                    row.bound_by,
                    f"{row.tokens_per_s:.0f}",
                    f"{row.output_tokens_per_s:.0f}",
                    *_price(row.price_per_million),
                    "" if row.fits else "more than the pages hold",
                ]
                for row in result.decode
            ),
        ]
    )


def _prefill(result: PlanResult) -> Iterator[str]:
    if not result.prefill:
        return
    yield "Prompts at best (roofline):"
    yield from _table(
        [
            [
                f"{row.num_tokens} tokens a step, prompts of {row.prompt}",
                f"{row.step_s * 1e3:.2f} ms",
                row.bound_by,
                f"{row.tokens_per_s:.0f} tokens/s",
                *(f"{price} per 1M" for price in _price(row.price_per_million)),
            ]
            for row in result.prefill
        ]
    )


def _price(price: float | None) -> list[str]:
    return [] if price is None else [f"{price:.3f}"]


def _layouts(result: PlanResult) -> Iterator[str]:
    if result.layouts:
        fits = any(item.fits for item in result.layouts)
        yield "Layouts, the best first:" if fits else "Layouts, of which none fits:"
        yield from _settings(result.layouts)


def _alternatives(result: PlanResult) -> Iterator[str]:
    if result.alternatives:
        yield "What would fit:"
        yield from _settings(result.alternatives)
    elif not result.fits:
        yield "Nothing that was tried instead fits."


def _settings(items: Sequence[Alternative]) -> Iterator[str]:
    rows = []
    for item in items:
        rate = "" if item.output_tokens_per_s is None else f"{item.output_tokens_per_s:.0f} tok/s"
        servers = f"{item.replicas} server(s)"
        checked = "compiled" if item.compiled else "by arithmetic"
        held = f"holds {item.concurrency:.1f} of the longest" if item.fits else item.why_not
        rows.append((item.flags, servers, rate, held, checked if item.fits else "does not fit"))
    yield from _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    width = max(map(len, rows))
    padded = [[*row, *[""] * (width - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    for row in padded:
        cells = (f"{cell:<{size}}" for cell, size in zip(row, widths, strict=True))
        yield "  " + "  ".join(cells).rstrip()


def _size(num_bytes: int) -> str:
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:.2f} GiB"
    return f"{num_bytes / _MIB:.2f} MiB"
