"""What JAX compiles for when the machine is not here: a Target's devices, from the compilers.

Only this module knows how a compiler is asked for a topology. A TPU's is in libtpu, a GPU's in
JAX's CUDA plugin; neither needs its device. The process must have been started with launch.py's
COMPILER_ENVIRONMENT. Interface: `target_devices(target)` gives `jax.Device`s that can be meshed and
compiled for, not run on.
"""

import threading
from collections.abc import Sequence
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from jaxinfer.errors import ConfigError, UserError
from jaxinfer.parallel.mesh import Device
from jaxinfer.planner.chips import Chip
from jaxinfer.planner.topologies import Target, family

_LOADING = threading.Lock()  # JAX loads a plugin at its first use, and not from two threads


class MissingCompilerError(UserError):
    """The target's compiler is not installed; the message names what to install."""


def target_devices(target: Target) -> tuple[Device, ...]:
    """The devices; a CPU's are real. Raises MissingCompilerError, and ConfigError for what the
    compiler refuses."""
    with _LOADING:
        if target.chip.platform == "tpu":
            return _tpu_devices(target)
        if target.chip.platform == "gpu":
            return _gpu_devices(target)
    return stand_ins(target.num_devices)


def prepare_stand_ins(target: Target) -> None:
    """Makes virtual CPU devices, at the start of a process; as many as alternatives may want."""
    count = max(target.num_devices, *(other.num_devices for other in family(target)))
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)


def stand_ins(num_devices: int) -> tuple[Device, ...]:
    """Virtual CPU devices for shapes and shardings, where no program is compiled."""
    found: list[Device] = jax.devices("cpu")  # type: ignore[assignment]
    assert len(found) >= num_devices, "prepare_stand_ins was not called, or too late"
    return tuple(found[:num_devices])


def _is_installed(module: str) -> bool:
    """Also answers where the package around the module is missing: `find_spec` raises then."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _tpu_devices(target: Target) -> tuple[Device, ...]:
    if not _is_installed("libtpu"):
        raise MissingCompilerError(
            f"topology={target.name!r} needs the TPU compiler, which is not installed here: "
            "pip install 'jaxinfer[plan-tpu]' (libtpu; no TPU is needed)."
        )
    grid = "x".join(map(str, target.grid))
    try:
        found: Sequence[Device] = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{target.chip.name}:{grid}",
            chips_per_host_bounds=target.chips_per_host,
        ).devices  # type: ignore[assignment]
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"topology={target.name!r} is refused by the TPU compiler: {error}"
        ) from error
    return tuple(found)


def _gpu_devices(target: Target) -> tuple[Device, ...]:
    if not any(_is_installed(f"jax_plugins.xla_{name}") for name in ("cuda12", "cuda13")):
        raise MissingCompilerError(
            f"topology={target.name!r} needs the CUDA compiler, which is not installed here: "
            "pip install 'jaxinfer[gpu]' (no GPU is needed)."
        )
    found: Sequence[Device] = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x1x{target.num_devices}",  # slices x hosts x GPUs of a host
        target_config=_target_config(target.chip),
    ).devices  # type: ignore[assignment]
    return tuple(found)


def _target_config(chip: Chip) -> str:
    """XLA's GpuTargetConfigProto as text (xla/stream_executor/device_description.proto)."""
    gpu = chip.gpu
    assert gpu is not None and chip.rates is not None, "every GPU of chips.py has both"
    feature = "ACCELERATED_FEATURES" if gpu.has_own_features else "NONE"
    return f"""
        gpu_device_info {{
            threads_per_block_limit: 1024
            threads_per_warp: 32
            shared_memory_per_block: 49152
            shared_memory_per_core: {gpu.shared_memory_per_core}
            threads_per_core_limit: 2048
            core_count: {gpu.num_cores}
            fpus_per_core: {64 if gpu.major == 8 else 128}
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65535
            block_dim_limit_z: 65535
            memory_bandwidth: {int(chip.rates.bytes_per_s)}
            l2_cache_size: {gpu.l2_bytes}
            clock_rate_ghz: {gpu.clock_ghz}
            device_memory_size: {chip.usable_bytes}
            shared_memory_per_block_optin: {gpu.shared_memory_per_block}
            registers_per_core_limit: 65536
            registers_per_block_limit: 65536
            cuda_compute_capability {{
                major: {gpu.major} minor: {gpu.minor} feature_extension: {feature}
            }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
        device_description_str: "{chip.device_kind}"
    """
