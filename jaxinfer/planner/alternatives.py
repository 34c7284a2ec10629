"""Other settings to try when what was asked for does not fit, or to compare in a sweep.

Only names candidates, those that change least first; whoever asks checks each. Imports no JAX.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from jaxinfer.config.schema import EngineConfig
from jaxinfer.planner.topologies import Target, family

_SHORTEST_CONTEXT = 1024
_SMALL_STEP = (512, 64)  # tokens and sequences


@dataclass(frozen=True, kw_only=True)
class Option:
    """Settings and a machine; `flags` is what the user would write for them."""

    kind: str  # what is changed; of a kind the first that fits is enough
    flags: str
    config: EngineConfig
    target: Target


Change = Callable[[EngineConfig, Target], Iterator[Option]]


def options(config: EngineConfig, target: Target) -> Iterator[Option]:
    """Smaller types, more devices of the machine, shorter contexts, larger machines."""
    for change in (_smaller_types, _more_devices, _small_steps, _shorter, _larger_machines):
        yield from change(config, target)


def combined_options(config: EngineConfig, target: Target) -> Iterator[Option]:
    """Two changes at once, for what no single one makes fit. Devices that are there cost nothing:
    most of them first."""
    pairs: tuple[tuple[Change, Change], ...] = (
        (_all_devices_first, _smaller_types),
        (_all_devices_first, _shorter),
        (_smaller_types, _shorter),
        (_larger_machines, _smaller_types),
        (_larger_machines, _shorter),
    )
    for first_change, second_change in pairs:
        for first in first_change(config, target):
            for second in second_change(first.config, first.target):
                yield replace(
                    second,
                    kind=f"{first.kind} and {second.kind}",
                    flags=f"{first.flags} {second.flags}",
                )


def sweep_options(config: EngineConfig, target: Target) -> Iterator[Option]:
    """Each size of tensor parallelism that divides the machine; the rest are replicas."""
    for size in _divisors(target.num_devices):
        yield _with_tensor(config, target, size)


def with_utilization(config: EngineConfig, target: Target, utilization: float) -> Option:
    """A smaller part of the memory for what the engine plans with."""
    cache = replace(config.cache, gpu_memory_utilization=utilization)
    return Option(
        kind="utilization",
        flags=f"--gpu-memory-utilization {utilization:.2f}",
        config=replace(config, cache=cache),
        target=target,
    )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _more_devices(config: EngineConfig, target: Target) -> Iterator[Option]:
    for size in _divisors(target.num_devices):
        if size > config.parallel.tensor_parallel_size:
            yield _with_tensor(config, target, size)


def _all_devices_first(config: EngineConfig, target: Target) -> Iterator[Option]:
    yield from reversed(list(_more_devices(config, target)))


def _larger_machines(config: EngineConfig, target: Target) -> Iterator[Option]:
    for larger in family(target):
        if larger.num_devices > target.num_devices:
            option = _with_tensor(config, larger, larger.num_devices)
            yield replace(option, kind="machine", flags=f"--topology {larger.name} {option.flags}")


def _with_tensor(config: EngineConfig, target: Target, size: int) -> Option:
    parallel = replace(config.parallel, tensor_parallel_size=size)
    return Option(
        kind="tensor",
        flags=f"--tensor-parallel-size {size}",
        config=replace(config, parallel=parallel),
        target=target,
    )


def _smaller_types(config: EngineConfig, target: Target) -> Iterator[Option]:
    if config.model.dtype == "float32":
        model = replace(config.model, dtype="bfloat16")
        yield Option(
            kind="dtype",
            flags="--dtype bfloat16",
            config=replace(config, model=model),
            target=target,
        )
    if config.cache.kv_cache_dtype in ("auto", "float32", "bfloat16", "float16"):
        # Kernels take pages of 8-bit numbers in whole tiles: 32 tokens.
        cache = replace(
            config.cache, kv_cache_dtype="fp8", block_size=max(config.cache.block_size or 0, 32)
        )
        yield Option(
            kind="cache",
            flags=f"--kv-cache-dtype fp8 --block-size {cache.block_size}",
            config=replace(config, cache=cache),
            target=target,
        )


def _small_steps(config: EngineConfig, target: Target) -> Iterator[Option]:
    tokens, seqs = _SMALL_STEP
    scheduler = replace(config.scheduler, max_num_batched_tokens=tokens, max_num_seqs=seqs)
    if scheduler != config.scheduler:
        yield Option(
            kind="step",
            flags=f"--max-num-batched-tokens {tokens} --max-num-seqs {seqs}",
            config=replace(config, scheduler=scheduler),
            target=target,
        )


def _shorter(config: EngineConfig, target: Target) -> Iterator[Option]:
    """The longest first."""
    length = config.model.max_model_len
    candidates = [2**power for power in range(20, 9, -1)]
    for candidate in candidates:
        if candidate >= _SHORTEST_CONTEXT and (length is None or candidate < length):
            model = replace(config.model, max_model_len=candidate)
            yield Option(
                kind="context",
                flags=f"--max-model-len {candidate}",
                config=replace(config, model=model),
                target=target,
            )
