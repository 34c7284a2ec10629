"""From settings, model and devices to the numbers that everything is compiled for.

Joins config/resolve.py and the memory plan to what JAX knows of the devices. Compiles nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

from jaxinfer.config.resolve import DeviceFacts, ModelFacts, describe, resolve
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.kv_cache.layout import KVLayout, page_dtype
from jaxinfer.logging import get_logger
from jaxinfer.models.base import ModelDef
from jaxinfer.parallel.mesh import Device
from jaxinfer.runner.abstract import AbstractModel, state_bytes
from jaxinfer.runner.memory import (
    MemoryNeeds,
    MemoryPlan,
    available_cpu_bytes,
    estimate_temp_bytes,
)
from pallas_kernels.devices import TPUS
from pallas_kernels.paged_attention.tuning import AttentionShape, best_page_size

logger = get_logger(__name__)


def platform_of(device: Device) -> str:
    """cpu, gpu or tpu."""
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def attention_shape(config: EngineConfig, definition: ModelDef) -> AttentionShape:
    """What attention kernels are made for, on one device; `config` is resolved."""
    shape, tensor = definition.shape, config.parallel.tensor_parallel_size
    assert config.cache.block_size is not None
    return AttentionShape(
        num_kv_heads=shape.num_kv_heads // tensor,
        group=shape.queries_per_kv,
        head_dim=shape.head_dim,
        query_dtype=config.model.dtype,
        page_dtype=page_dtype(config.cache.kv_cache_dtype),
        page_size=config.cache.block_size,
    )


def resolve_config(
    config: EngineConfig, definition: ModelDef, devices: Sequence[Device]
) -> EngineConfig:
    """The settings with nothing left to choose; logs what was chosen."""
    device = devices[0]
    facts = DeviceFacts(
        platform=platform_of(device),
        device_kind=device.device_kind,
        num_devices=len(devices),
        memory_bytes=device_bytes(device, num_sharing=config.parallel.tensor_parallel_size),
    )
    return resolve_for(config, definition, facts)


def resolve_for(config: EngineConfig, definition: ModelDef, device: DeviceFacts) -> EngineConfig:
    """`resolve_config` for devices that need not be here."""
    shape = definition.shape
    if device.device_kind in TPUS:
        heads = shape.num_kv_heads // config.parallel.tensor_parallel_size

        def page_size(kv_cache_dtype: str) -> int:
            attention = AttentionShape(
                num_kv_heads=heads,
                group=shape.queries_per_kv,
                head_dim=shape.head_dim,
                query_dtype="bfloat16",
                page_dtype=page_dtype(kv_cache_dtype),
                page_size=16,
            )
            return best_page_size(TPUS[device.device_kind], attention)

        device = replace(device, page_size=page_size)
    model = ModelFacts(
        max_position_embeddings=shape.max_position_embeddings, dtype=shape.checkpoint_dtype
    )
    resolution = resolve(config, model, device)
    logger.info("settings that were chosen:\n%s", describe(resolution.choices))
    return resolution.config


def device_bytes(device: Device, *, num_sharing: int) -> int:
    """Memory of one device; virtual CPU devices share the machine's."""
    if platform_of(device) == "cpu":
        return available_cpu_bytes() // num_sharing
    return int(device.memory_stats()["bytes_limit"])


def memory_needs(config: EngineConfig, model: AbstractModel) -> MemoryNeeds:
    """What the memory plan is made from; `config` is resolved, the temporaries are a guess."""
    device = model.mesh.devices.flat[0]
    num_sharing = config.parallel.tensor_parallel_size
    return memory_needs_on(
        platform_of(device), device_bytes(device, num_sharing=num_sharing), config, model
    )


def memory_needs_on(
    platform: str, memory_bytes: int, config: EngineConfig, model: AbstractModel
) -> MemoryNeeds:
    """`memory_needs` with devices of so many bytes, which need not be here."""
    shape, scheduler = model.definition.shape, config.scheduler
    max_model_len = config.model.max_model_len
    assert scheduler.max_num_seqs and scheduler.max_num_batched_tokens and max_model_len
    assert config.cache.block_size is not None
    tensor = config.parallel.tensor_parallel_size
    return MemoryNeeds(
        platform=platform,
        device_bytes=memory_bytes,
        weight_bytes=model.weight_bytes,
        state_bytes=state_bytes(
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=max_model_len,
            page_size=config.cache.block_size,
            vocab_size=shape.vocab_size,
        ),
        temp_bytes=estimate_temp_bytes(
            num_tokens=scheduler.max_num_batched_tokens,
            num_seqs=scheduler.max_num_seqs,
            model_dim_bytes=4 * model.widest_dim,
            vocab_size=shape.vocab_size,
        ),
        layout=KVLayout(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads // tensor,
            head_dim=shape.head_dim,
            dtype_bytes=model.kernels.kv_storage_dtype(
                page_dtype(config.cache.kv_cache_dtype)
            ).itemsize,
            page_size=config.cache.block_size,
        ),
        max_model_len=max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
    )


def make_limits(config: EngineConfig, memory: MemoryPlan) -> EngineLimits:
    """The engine's limits; `config` is resolved."""
    scheduler, max_model_len = config.scheduler, config.model.max_model_len
    assert scheduler.max_num_seqs and scheduler.max_num_batched_tokens and max_model_len
    assert config.cache.block_size is not None
    return EngineLimits(
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_model_len=max_model_len,
        page_size=config.cache.block_size,
        num_pages=memory.num_pages,
    )
