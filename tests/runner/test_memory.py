"""The memory plan: its numbers, and messages that say what would fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer.config.schema import CacheConfig
from jaxinfer.errors import CapacityError
from jaxinfer.kv_cache.layout import KVLayout
from jaxinfer.runner import memory
from jaxinfer.runner.memory import (
    CPU_KV_BYTES,
    MemoryNeeds,
    available_cpu_bytes,
    estimate_temp_bytes,
    plan_memory,
    with_measured_temp,
)

GIB = 2**30
LAYOUT = KVLayout(num_layers=4, num_kv_heads=8, head_dim=64, dtype_bytes=2, page_size=16)
PAGE_BYTES = 4 * 8 * 2 * 64 * 2 * 16
NEEDS = MemoryNeeds(
    platform="tpu",
    device_bytes=16 * GIB,
    weight_bytes=8 * GIB,
    state_bytes=GIB // 8,
    temp_bytes=GIB,
    layout=LAYOUT,
    max_model_len=4096,
    max_num_seqs=4096,
)


def number_after(flag: str, message: str) -> int:
    found = re.search(rf"{flag}[ =](\d+)", message)
    assert found, f"{flag} with a number is not in: {message}"
    return int(found[1])


def test_what_is_left_goes_to_pages():
    plan = plan_memory(NEEDS, CacheConfig(gpu_memory_utilization=0.75))
    assert plan.usable_bytes == 12 * GIB
    assert plan.page_bytes == PAGE_BYTES
    assert plan.num_pages == (12 * GIB - 8 * GIB - GIB // 8 - GIB) // PAGE_BYTES
    assert plan.total_bytes == 8 * GIB + GIB // 8 + GIB + plan.num_pages * PAGE_BYTES
    assert plan.fits
    assert "--gpu-memory-utilization" in plan.kv_reason
    assert plan.total_bytes + PAGE_BYTES > plan.usable_bytes, "a page more would not fit"


def test_no_more_pages_than_all_sequences_can_use():
    needs = replace(NEEDS, max_num_seqs=2, max_model_len=100)
    plan = plan_memory(needs, CacheConfig())
    assert plan.num_pages == 2 * 7
    assert "--max-num-seqs" in plan.kv_reason


def test_a_cpu_takes_little_unasked_but_enough_for_one_sequence():
    plan = plan_memory(replace(NEEDS, platform="cpu"), CacheConfig())
    assert plan.kv_bytes == CPU_KV_BYTES // PAGE_BYTES * PAGE_BYTES
    assert "--kv-cache-memory-bytes" in plan.kv_reason
    large = replace(NEEDS, platform="cpu", max_model_len=3 * CPU_KV_BYTES // PAGE_BYTES * 16 // 2)
    assert plan_memory(large, CacheConfig()).kv_bytes > CPU_KV_BYTES


def test_explicit_sizes_are_taken():
    by_pages = plan_memory(NEEDS, CacheConfig(num_gpu_blocks_override=300))
    assert by_pages.num_pages == 300
    assert by_pages.kv_reason == "--num-gpu-blocks-override"
    by_bytes = plan_memory(NEEDS, CacheConfig(kv_cache_memory_bytes=300 * PAGE_BYTES + 5))
    assert by_bytes.num_pages == 300
    assert by_bytes.kv_reason == "--kv-cache-memory-bytes"


def test_the_table_adds_up():
    plan = plan_memory(NEEDS, CacheConfig())
    lines = {line.split("  ")[1].strip(): line for line in plan.table().splitlines()}
    assert list(lines) == ["weights", "slot state", "largest step", "KV cache", "total"]
    assert "8.00 GiB" in lines["weights"]
    assert f"{plan.num_pages} pages of 16 = {plan.num_pages * 16} tokens" in lines["KV cache"]
    assert "of 14.72 GiB usable" in lines["total"]


# Whatever a message names would really fit.


def test_a_context_too_long_names_one_that_fits():
    needs = replace(NEEDS, max_model_len=2_000_000)
    with pytest.raises(CapacityError) as caught:
        plan_memory(needs, CacheConfig())
    message = str(caught.value)
    assert "--max-model-len 2000000 needs 125000 KV pages" in message
    fitting = number_after("--max-model-len", message.splitlines()[-1])
    plan_memory(replace(needs, max_model_len=fitting), CacheConfig())
    with pytest.raises(CapacityError):
        plan_memory(replace(needs, max_model_len=fitting + 1), CacheConfig())


def test_a_tiny_cache_names_one_that_is_large_enough():
    with pytest.raises(CapacityError) as caught:
        plan_memory(NEEDS, CacheConfig(kv_cache_memory_bytes=100))
    message = str(caught.value)
    assert "0 were planned" in message
    assert "--max-model-len 0" not in message, "nothing fits into no page"
    needed = number_after("--kv-cache-memory-bytes", message)
    assert plan_memory(NEEDS, CacheConfig(kv_cache_memory_bytes=needed)).num_pages == 256
    with pytest.raises(CapacityError, match="--max-model-len 160 would fit"):
        plan_memory(NEEDS, CacheConfig(num_gpu_blocks_override=10))


def test_a_cache_too_large_names_the_largest():
    with pytest.raises(CapacityError, match="At most") as caught:
        plan_memory(NEEDS, CacheConfig(kv_cache_memory_bytes=20 * GIB))
    largest = number_after("--kv-cache-memory-bytes", str(caught.value).splitlines()[-1])
    plan_memory(NEEDS, CacheConfig(kv_cache_memory_bytes=largest))
    with pytest.raises(CapacityError):
        plan_memory(NEEDS, CacheConfig(kv_cache_memory_bytes=largest + PAGE_BYTES))


def test_weights_too_large():
    needs = replace(NEEDS, weight_bytes=15 * GIB)
    with pytest.raises(CapacityError, match="weights alone.*smaller model or --dtype"):
        plan_memory(needs, CacheConfig())
    with pytest.raises(CapacityError, match="--gpu-memory-utilization"):
        plan_memory(NEEDS, CacheConfig(gpu_memory_utilization=0.001))


def test_a_step_too_large():
    needs = replace(NEEDS, temp_bytes=9 * GIB)
    with pytest.raises(CapacityError, match="step alone.*--max-num-batched-tokens"):
        plan_memory(needs, CacheConfig())


def test_measured_temporaries_can_break_a_plan():
    plan = plan_memory(NEEDS, CacheConfig())
    assert with_measured_temp(plan, GIB // 2).fits
    broken = with_measured_temp(plan, 2 * GIB)
    assert not broken.fits
    again = plan_memory(replace(NEEDS, temp_bytes=2 * GIB), CacheConfig())
    assert again.num_pages < plan.num_pages
    assert again.fits


def test_the_estimate_grows_with_the_step():
    def estimate(num_tokens: int, num_seqs: int, vocab_size: int) -> int:
        return estimate_temp_bytes(
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            model_dim_bytes=4 * 1024,
            vocab_size=vocab_size,
        )

    base = estimate(512, 64, 32_000)
    assert base > 512 * 4096 + 64 * 32_000 * 4, "the activations and the logits themselves"
    assert estimate(1024, 64, 32_000) > base
    assert estimate(512, 256, 32_000) > base
    assert estimate(512, 64, 128_000) > base


def test_available_memory_is_a_sane_number():
    assert 2**26 < available_cpu_bytes() < 2**50


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({"memory.max": "8388608", "memory.current": "3145728"}, 5 * 2**20),
        (
            {
                "memory.max": "8388608",
                "memory.current": "7340032",
                "memory.stat": "anon 1048576\nfile 6291456\ninactive_file 4194304\n",
            },
            5 * 2**20,  # cached files that nobody uses are given up
        ),
        ({"memory.max": "1048576", "memory.current": "2097152"}, 0),
        ({"memory.max": "max", "memory.current": "2097152"}, 2**60),
        ({}, 2**60),
    ],
    ids=["limit", "page cache", "above", "no limit", "no group"],
)
def test_a_containers_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], available: int
):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 2**60)
    assert available_cpu_bytes() == available
