"""Which kernels an engine calls: joins its settings and the device to what pallas_kernels offers.

Knows platforms; how an implementation is chosen among those of a platform is pallas_kernels'.
"""

from importlib.metadata import version

import jax

import pallas_kernels
from jaxinfer.config.env import cache_dir, compiler_flags
from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.logging import get_logger, log_phase
from jaxinfer.models.base import ModelDef
from jaxinfer.parallel.mesh import Device, num_cores
from jaxinfer.runner.kernel_check import ChildCheck
from jaxinfer.runner.program_store import digest_of_sources
from jaxinfer.runner.sizing import attention_shape, platform_of
from pallas_kernels.checked import choose_checked_kernels
from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.matmul.cpu import StoredDType
from pallas_kernels.native.library import load_native_kernels
from pallas_kernels.paged_attention.gpu_choice import GpuRequest, GpuSpec, refusal

logger = get_logger(__name__)


def choose_engine_kernels(config: EngineConfig, definition: ModelDef, device: Device) -> KernelSet:
    """The kernels for resolved settings; logs why. A GPU's are tried on it first.

    Raises ConfigError for an attention backend that was asked for and cannot be had.
    """
    platform = platform_of(device)
    if platform == "gpu":
        kernels = _choose_on_gpu(config, definition, device)
    else:
        kernels = _choose_elsewhere(config, definition, device, platform)
    for line in (*kernels.reasons, *kernels.verdicts):
        logger.info("kernel %s", line)
    return kernels


def _choose_elsewhere(
    config: EngineConfig, definition: ModelDef, device: Device, platform: str
) -> KernelSet:
    native, asked = None, config.compile.attention_backend
    if platform == "cpu" and config.compile.native_kernels:
        with log_phase(logger, "prepare C++ kernels"):
            shape = attention_shape(config, definition)
            native = load_native_kernels(
                cache_dir() / "native", head_dim=shape.head_dim, page_dtype=shape.page_dtype
            )
    kernels = choose_kernels(
        platform=platform,
        native=native,
        stored_weights=_stored_weights(config),
        device_kind=device.device_kind,
        num_cores=num_cores(device),
        attention_shape=attention_shape(config, definition),
        attention_backend=asked,
    )
    refuse_another(config, kernels)
    return kernels


def refuse_another(config: EngineConfig, kernels: KernelSet) -> None:
    """Raises ConfigError if an attention backend was asked for and these are another's."""
    if config.compile.attention_backend not in ("auto", kernels.attention_backend):
        raise _not_to_be_had(config, kernels.reasons[0])


def _choose_on_gpu(config: EngineConfig, definition: ModelDef, device: Device) -> KernelSet:
    gpu = GpuSpec(compute_capability=str(device.compute_capability), num_cores=device.core_count)
    request = gpu_request(config, definition, gpu)
    with log_phase(logger, "check kernels"):
        return choose_checked_kernels(
            request,
            check=ChildCheck(
                request=request,
                identity=_identity(device),
                directory=cache_dir() / "kernel-checks",
            ),
        )


def gpu_request(config: EngineConfig, definition: ModelDef, gpu: GpuSpec) -> GpuRequest:
    """What attention on a GPU, which need not be here, is chosen for; `config` is resolved.

    Raises ConfigError for a backend that was asked for and does not serve the GPU or the shape.
    """
    asked = config.compile.attention_backend
    assert asked in ("auto", "mosaic_gpu", "triton", "xla"), asked
    request = GpuRequest(device=gpu, shape=attention_shape(config, definition), override=asked)
    if asked != "auto":
        why_not = refusal(asked, request.shape, gpu)
        if why_not is not None:
            raise _not_to_be_had(config, why_not)
    return request


def _not_to_be_had(config: EngineConfig, reason: str) -> ConfigError:
    return ConfigError(
        f"attention_backend={config.compile.attention_backend!r} cannot be had here ({reason}). "
        "Leave the flag out, or give xla, which runs everywhere."
    )


def _identity(device: Device) -> str:
    """What a kernel's answers depend on besides its shapes."""
    lines = (
        f"jax {jax.__version__} jaxlib {version('jaxlib')}",
        f"{device.client.platform_version} {device.device_kind} {compiler_flags()}",
        f"sources {digest_of_sources(pallas_kernels)}",
    )
    return "\n".join(lines)


def _stored_weights(config: EngineConfig) -> StoredDType | None:
    """The type in which a CPU's product may store weights.

    None where it cannot be used: it knows no mesh and no float16.
    """
    weights = config.model.weight_dtype
    if config.parallel.tensor_parallel_size > 1 or config.model.dtype == "float16":
        return None
    return weights if weights in ("float32", "bfloat16") else None
