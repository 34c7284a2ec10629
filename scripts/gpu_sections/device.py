"""What the device is, and the two rates that shares refer to: copies and matrix products."""

import jax
import jax.numpy as jnp

from gpu_sections.child import SectionRun
from gpu_sections.timing import Work, compile_loop


def run(section: SectionRun) -> None:
    device = jax.devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm", "gpu") else device.platform
    stats = device.memory_stats() or {}
    facts = {
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "num_cores": getattr(device, "core_count", 0),
    }
    section.row(
        name="device",
        platform=platform,
        kind=device.device_kind,
        num_devices=jax.device_count(),
        jax=jax.__version__,
        runtime=device.client.platform_version.splitlines()[0],
        memory_limit_gib=round(stats.get("bytes_limit", 0) / 2**30, 1),
        **facts,
    )
    if platform == "cpu" and not section.is_rehearsal:
        return
    for name, value in facts.items():
        section.row(name=name, value=value)
    section.row(name="copy_bytes_per_s", value=copy_rate(2**16 if section.is_rehearsal else 2**29))
    section.row(name="matmul_flops_per_s", value=matmul_rate(64 if section.is_rehearsal else 8192))


def copy_rate(num_values: int) -> float:
    """Bytes read and written a second, by a pass over float32 that changes every value."""
    values = jnp.arange(num_values, dtype=jnp.float32)
    num_bytes = 2 * values.nbytes
    work = Work(lambda x, _: x * jnp.float32(1.0001), lambda: None, values, ())
    return num_bytes / compile_loop(work, expected_s=num_bytes / 2e12).seconds(values, ())


def matmul_rate(dim: int) -> float:
    """Operations a second of a square product in bfloat16, of random values (zeros are faster)."""
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (dim, dim), jnp.bfloat16) for key in keys)

    def step(x: jax.Array, y: jax.Array) -> jax.Array:
        return (x @ y) * jnp.bfloat16(dim**-0.5)

    num_flops = 2 * dim**3
    work = Work(step, lambda y: y, left, (right,))
    return num_flops / compile_loop(work, expected_s=num_flops / 5e14).seconds(left, (right,))
