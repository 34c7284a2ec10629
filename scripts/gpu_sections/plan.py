"""Which sections there are, in what order, and how long each may take. Data only."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Section:
    """A child process, which calls `run` of `module` with `options`."""

    name: str
    module: str
    limit_s: float
    options: dict[str, Any] = field(default_factory=dict)
    is_timed: bool = True  # needs the device for itself


def _numerics(name: str, **options: Any) -> Section:
    options = {"head_dim": 128, "page_dtype": "bfloat16", **options}
    return Section(
        name=f"numerics {name}",
        module="gpu_sections.numerics",
        limit_s=75,
        options=options,
        is_timed=False,
    )


def _attention(backend: str, limit_s: float) -> Section:
    return Section(
        name=f"attention {backend}",
        module="gpu_sections.attention",
        limit_s=limit_s,
        options={"backend": backend},
    )


SECTIONS: tuple[Section, ...] = (
    Section(name="device", module="gpu_sections.device", limit_s=60),
    _numerics("mosaic_gpu H128", backend="mosaic_gpu"),
    _numerics("mosaic_gpu H64", backend="mosaic_gpu", head_dim=64),
    _numerics("triton H128", backend="triton"),
    _numerics("triton H64", backend="triton", head_dim=64),
    _numerics("triton int8", backend="triton", page_dtype="int8"),
    _numerics("triton fp8", backend="triton", page_dtype="float8_e4m3fn"),
    _numerics("xla H128", backend="xla"),
    _numerics("mosaic_gpu H256", backend="mosaic_gpu", head_dim=256),
    _attention("mosaic_gpu", 65),
    _attention("triton", 50),
    _attention("cudnn", 35),
    _attention("jax_paged", 35),
    Section(name="engine", module="gpu_sections.engine", limit_s=230),
    _attention("xla", 40),  # last: the one that nobody waits for
)
"""By what matters most, should there not be time for all."""
