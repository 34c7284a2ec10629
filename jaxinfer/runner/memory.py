"""How the device's memory is divided: weights, the largest step's temporaries, KV pages.

Arithmetic and a table; knows no arrays. The temporaries are XLA's own figure for the compiled
step (`memory_analysis`), first estimated so that the number of pages can be fixed before anything
is compiled, then checked.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from jaxinfer.config.schema import CacheConfig
from jaxinfer.errors import CapacityError
from jaxinfer.kv_cache.layout import KVLayout, num_pages_for

GPU_MEMORY_FRACTION = 0.9
"""What XLA is given of a GPU; the rest is for what CUDA's libraries allocate for themselves."""

_CGROUP = Path("/sys/fs/cgroup")  # as a container sees its own

CPU_KV_BYTES = 2 * 2**30
"""Most KV cache that is taken on a CPU unasked: the memory is shared with everything else."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes per device."""

    device_bytes: int  # what the device has (a CPU: what is available)
    usable_bytes: int  # the part of it that may be used
    weight_bytes: int
    state_bytes: int  # page table and sampler state
    temp_bytes: int  # temporaries of the largest step
    page_bytes: int  # one page in all layers
    num_pages: int
    page_size: int
    kv_reason: str  # why so many pages

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.state_bytes + self.temp_bytes + self.kv_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.usable_bytes

    def table(self) -> str:
        """The plan, one line a part."""
        tokens = self.num_pages * self.page_size
        rows = [
            ("weights", self.weight_bytes, ""),
            ("slot state", self.state_bytes, ""),
            ("largest step", self.temp_bytes, "temporaries"),
            (
                "KV cache",
                self.kv_bytes,
                f"{self.num_pages} pages of {self.page_size} = {tokens} tokens, {self.kv_reason}",
            ),
            ("total", self.total_bytes, f"of {_size(self.usable_bytes)} usable"),
        ]
        return "\n".join(f"  {name:<12} {_size(size):>10}  {note}" for name, size, note in rows)


def _size(num_bytes: int) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.2f} MiB"


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What the plan is made from; bytes per device."""

    platform: str
    device_bytes: int
    weight_bytes: int
    state_bytes: int
    temp_bytes: int
    layout: KVLayout
    max_model_len: int
    max_num_seqs: int


def plan_memory(needs: MemoryNeeds, cache: CacheConfig) -> MemoryPlan:
    """Divides the memory.

    Raises CapacityError, saying what would fit, when one sequence of `max_model_len` does not.
    """
    plan = draft_memory(needs, cache)
    _check(plan, needs)
    return plan


def draft_memory(needs: MemoryNeeds, cache: CacheConfig) -> MemoryPlan:
    """Divides the memory as `plan_memory` does, also where that does not fit."""
    usable_bytes = int(needs.device_bytes * cache.gpu_memory_utilization)
    page_bytes = needs.layout.bytes_per_page
    free_bytes = usable_bytes - needs.weight_bytes - needs.state_bytes - needs.temp_bytes
    num_pages, reason = _num_pages(needs, cache, max(free_bytes, 0))
    return MemoryPlan(
        device_bytes=needs.device_bytes,
        usable_bytes=usable_bytes,
        weight_bytes=needs.weight_bytes,
        state_bytes=needs.state_bytes,
        temp_bytes=needs.temp_bytes,
        page_bytes=page_bytes,
        num_pages=num_pages,
        page_size=needs.layout.page_size,
        kv_reason=reason,
    )


def _num_pages(needs: MemoryNeeds, cache: CacheConfig, free_bytes: int) -> tuple[int, str]:
    page_bytes = needs.layout.bytes_per_page
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override, "--num-gpu-blocks-override"
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes // page_bytes, "--kv-cache-memory-bytes"
    most_useful = needs.max_num_seqs * num_pages_for(needs.max_model_len, needs.layout.page_size)
    limits = [
        (free_bytes // page_bytes, "all that is left; --gpu-memory-utilization changes it"),
        (most_useful, "enough for --max-num-seqs sequences of --max-model-len"),
    ]
    if needs.platform == "cpu":
        one_sequence = num_pages_for(needs.max_model_len, needs.layout.page_size)
        most_on_cpu = max(CPU_KV_BYTES // page_bytes, one_sequence)
        limits.append((most_on_cpu, "usual on a CPU; --kv-cache-memory-bytes changes it"))
    return min(limits)


def _check(plan: MemoryPlan, needs: MemoryNeeds) -> None:
    needed = num_pages_for(needs.max_model_len, plan.page_size)
    if plan.num_pages >= needed and plan.fits:
        return
    room_bytes = max(plan.usable_bytes - (plan.total_bytes - plan.kv_bytes), 0)
    fitting_pages = min(plan.num_pages, room_bytes // plan.page_bytes)
    raise CapacityError(
        f"Not enough memory: one sequence of --max-model-len {needs.max_model_len} needs {needed} "
        f"KV pages ({_size(needed * plan.page_bytes)}); {plan.num_pages} were planned and there is "
        f"room for {fitting_pages}:\n{plan.table()}\n"
        f"{_repair(plan, needed=needed, fitting_pages=fitting_pages)}."
    )


def _repair(plan: MemoryPlan, *, needed: int, fitting_pages: int) -> str:
    """What would fit."""
    if plan.weight_bytes + plan.state_bytes >= plan.usable_bytes:
        return (
            "The weights alone are too large: use a smaller model or --dtype, more devices "
            "(--tensor-parallel-size), or more of the memory (--gpu-memory-utilization)"
        )
    if plan.total_bytes - plan.kv_bytes >= plan.usable_bytes:
        return (
            "The largest step alone is too large: lower --max-num-batched-tokens or "
            "--max-num-seqs, or use more of the memory (--gpu-memory-utilization)"
        )
    if fitting_pages >= needed:
        num_bytes = fitting_pages * plan.page_bytes
        return f"At most {fitting_pages} pages fit: --kv-cache-memory-bytes {num_bytes}"
    shorter = (
        f"--max-model-len {fitting_pages * plan.page_size} would fit; or give"
        if fitting_pages
        else "Give"
    )
    return (
        f"{shorter} the cache more (--gpu-memory-utilization, --kv-cache-memory-bytes "
        f"{needed * plan.page_bytes}), take a smaller --kv-cache-dtype, or more devices "
        "(--tensor-parallel-size)"
    )


def with_measured_temp(plan: MemoryPlan, temp_bytes: int) -> MemoryPlan:
    """The plan with XLA's figure for the temporaries in place of the estimate."""
    return replace(plan, temp_bytes=temp_bytes)


def estimate_temp_bytes(
    *, num_tokens: int, num_seqs: int, model_dim_bytes: int, vocab_size: int
) -> int:
    """A generous guess at the largest step's temporaries, from its shape.

    `model_dim_bytes` is the size of one token's widest activations; logits are float32 and a
    handful of copies of them live at once while sampling.
    """
    logits_bytes = 4 * vocab_size * max(num_seqs, 64)
    return 8 * num_tokens * model_dim_bytes + 6 * logits_bytes


def available_cpu_bytes() -> int:
    """Memory that may be taken now: the kernel's figure, or what a container's limit leaves."""
    return min([_meminfo_available(), *_left_in_cgroup(_CGROUP)])


def _left_in_cgroup(directory: Path) -> list[int]:
    """What the limit of a control group (cgroup v2) leaves; nothing where there is no limit.

    `memory.current` counts cached files, such as a checkpoint that was just read. The kernel drops
    those that are not in use before it refuses memory, so they are free.
    """
    limit, used = directory / "memory.max", directory / "memory.current"
    if not (limit.is_file() and used.is_file()):
        return []
    text = limit.read_text().strip()
    if text == "max":
        return []
    statistics = directory / "memory.stat"
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    unused_files = int(dict(line.split() for line in lines).get("inactive_file", 0))
    return [max(int(text) - int(used.read_text()) + unused_files, 0)]


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
