"""Other settings to try when what was asked for does not fit, or to compare in a sweep.

Only names candidates, those that change least first; whoever asks checks each. Imports no JAX.
"""

from collections.abc import Iterator
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


def options(config: EngineConfig, target: Target) -> Iterator[Option]:
    """Smaller types, more devices of the machine, shorter contexts, larger machines."""
    yield from _smaller_types(config, target)
    tensor = config.parallel.tensor_parallel_size
    for size in _powers(2 * tensor, target.num_devices):
        yield _with_tensor(config, target, size)
    yield from _small_steps(config, target)
    yield from _shorter(config, target)
    for larger in family(target):
        if larger.num_devices > target.num_devices:
            option = _with_tensor(config, larger, larger.num_devices)
            yield replace(option, kind="machine", flags=f"--topology {larger.name} {option.flags}")


def sweep_options(config: EngineConfig, target: Target) -> Iterator[Option]:
    """Each size of tensor parallelism that divides the machine; the rest are replicas."""
    for size in range(1, target.num_devices + 1):
        if target.num_devices % size == 0:
            yield _with_tensor(config, target, size)


def _powers(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


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
