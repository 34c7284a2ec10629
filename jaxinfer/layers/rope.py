"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in Hugging Face's half layout.

Knows the scaling rules that checkpoints name in `rope_parameters` (transformers 5) or
`rope_scaling` (transformers 4); refuses others by name. Angles are computed once per step and
shared by all layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.errors import CheckpointError

_COMMON_KEYS = frozenset(
    "rope_type type rope_theta partial_rotary_factor original_max_position_embeddings".split()
)
_YARN_KEYS = "factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate"
_KEYS_BY_TYPE: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset("factor low_freq_factor high_freq_factor".split()),
    "yarn": frozenset(_YARN_KEYS.split()),
}


_POSITIVE_KEYS = frozenset(
    "rope_theta original_max_position_embeddings factor low_freq_factor high_freq_factor".split()
)
_NUMBER_KEYS = frozenset(
    "partial_rotary_factor attention_factor beta_fast beta_slow mscale mscale_all_dim".split()
)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Inverse frequencies [H/2] and the factor on cos and sin."""

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


class RopeAngles(NamedTuple):
    """cos and sin of every token's angles, float32 [T, H/2]."""

    cos_TH: Array
    sin_TH: Array


def rope_from_hf(config: Mapping[str, Any], *, head_dim: int) -> RopeConfig:
    """Reads either spelling of config.json. Raises CheckpointError on what it does not know."""
    parameters = _parameters(config)
    rope_type = parameters["rope_type"]
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if partial != 1:
        raise CheckpointError(
            f"partial_rotary_factor {partial} of config.json is not supported; only 1 is."
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inv_freq = 1.0 / float(parameters["rope_theta"]) ** exponents
    try:
        if rope_type == "linear":
            inv_freq = inv_freq / parameters["factor"]
        elif rope_type == "llama3":
            inv_freq = _llama3(inv_freq, parameters)
        elif rope_type == "yarn":
            return _yarn(inv_freq, parameters, config)
    except KeyError as error:
        raise CheckpointError(
            f"rope_type {rope_type!r} needs {error.args[0]!r} in rope_parameters of config.json."
        ) from None
    return RopeConfig(inv_freq=tuple(inv_freq.tolist()))


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters, with `rope_type` and `rope_theta`, checked for keys nobody reads."""
    new, old = _section(config, "rope_parameters"), _section(config, "rope_scaling")
    if new and old and new != old:
        raise CheckpointError(
            f"config.json has both rope_parameters {new} and rope_scaling {old}: remove the one "
            "that does not hold."
        )
    parameters = {key: value for key, value in (new or old).items() if value is not None}
    parameters.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope_type = parameters.setdefault("rope_type", parameters.get("type") or "default")
    if not isinstance(rope_type, str) or rope_type not in _KEYS_BY_TYPE:
        raise CheckpointError(
            f"rope_type {rope_type!r} of config.json is not supported; this version knows "
            f"{', '.join(_KEYS_BY_TYPE)}."
        )
    _check_values(parameters)
    unknown = parameters.keys() - _COMMON_KEYS - _KEYS_BY_TYPE[rope_type]
    if unknown:
        raise CheckpointError(
            f"rope_parameters of config.json have {', '.join(sorted(unknown))}, which this "
            f"version does not know for rope_type {rope_type!r} and will not ignore."
        )
    return parameters


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{key} of config.json must be an object, got {value!r}.")
    return value


def _check_values(parameters: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a value that is no number where one is reckoned with."""
    for name in parameters.keys() & (_POSITIVE_KEYS | _NUMBER_KEYS):
        value, is_positive = parameters[name], name in _POSITIVE_KEYS
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or value < 0 or (is_positive and value == 0):
            raise CheckpointError(
                f"{name} in the rope parameters of config.json must be a "
                f"{'positive number' if is_positive else 'number of at least 0'}, got {value!r}."
            )
    low, high = parameters.get("low_freq_factor", 1), parameters.get("high_freq_factor", 4)
    if high <= low:
        raise CheckpointError(
            f"high_freq_factor {high} in the rope parameters of config.json must be above "
            f"low_freq_factor {low}."
        )
    if parameters["rope_theta"] == 1:
        raise CheckpointError("rope_theta 1 of config.json turns nothing: it must be above 1.")


def _llama3(inv_freq: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1's rule: long waves are slowed by `factor`, short ones kept, others blended."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clip(0.0, 1.0)
    return inv_freq * (kept + (1 - kept) / parameters["factor"])


def _yarn(
    inv_freq: np.ndarray, parameters: Mapping[str, Any], config: Mapping[str, Any]
) -> RopeConfig:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): blend by how often a dimension turns."""
    original = (
        parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
    )
    factor = parameters.get("factor") or config["max_position_embeddings"] / original
    half, theta = len(inv_freq), float(parameters["rope_theta"])

    def dimension_of(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low = dimension_of(parameters.get("beta_fast") or 32.0)
    high = dimension_of(parameters.get("beta_slow") or 1.0)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = ((np.arange(half) - low) / max(high - low, 0.001)).clip(0.0, 1.0)
    blended = inv_freq * (1 - ramp) + inv_freq / factor * ramp
    return RopeConfig(
        inv_freq=tuple(blended.tolist()), attention_factor=_yarn_factor(factor, parameters)
    )


def _yarn_factor(factor: float, parameters: Mapping[str, Any]) -> float:
    """The scale of cos and sin; DeepSeek's mscale pair overrides the paper's formula."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(parameters["mscale"]) / mscale(parameters["mscale_all_dim"])
    return mscale(1.0)


def rope_angles(positions_T: Array, config: RopeConfig) -> RopeAngles:
    """Angles of int32 positions [T]; float32, since bfloat16 rounds positions above 256."""
    inv_freq = jnp.asarray(np.asarray(config.inv_freq, np.float32))
    angle_TH = positions_T.astype(jnp.float32)[:, None] * inv_freq[None, :]
    factor = jnp.float32(config.attention_factor)
    return RopeAngles(cos_TH=jnp.cos(angle_TH) * factor, sin_TH=jnp.sin(angle_TH) * factor)


def shared_rope_angles(positions_T: Array, config: RopeConfig) -> RopeAngles:
    """`rope_angles` for all layers of a step, computed once.

    XLA would rather compute sines again in every layer than read them. A barrier stops it, but
    XLA:CPU drops barriers before it fuses; a branch it keeps (docs/benchlog.md).
    """

    def angles(positions_T: Array) -> RopeAngles:
        return rope_angles(positions_T, config)

    def none(positions_T: Array) -> RopeAngles:
        zeros_TH = jnp.zeros((positions_T.shape[0], len(config.inv_freq)), jnp.float32)
        return RopeAngles(cos_TH=zeros_TH, sin_TH=zeros_TH)

    def branch(positions_T: Array) -> RopeAngles:
        # No position is negative, which XLA does not know.
        return jax.lax.cond(positions_T[0] >= 0, angles, none, positions_T)

    def barrier(positions_T: Array) -> RopeAngles:
        return jax.lax.optimization_barrier(angles(positions_T))

    return jax.lax.platform_dependent(positions_T, cpu=branch, default=barrier)


def apply_rope(x: Array, angles: RopeAngles) -> Array:
    """Rotates x [T, ..., H]; the pairs are (h, h + H/2), as in Hugging Face checkpoints."""
    return jax.lax.platform_dependent(x, angles, tpu=rotate_by_product, default=_rotate)


def rotate_by_product(x: Array, angles: RopeAngles) -> Array:
    """For a TPU: its matrix unit moves a head's halves in the pass that turns them. Halves of
    a register are cut and joined in several, with the head as float32 in memory between."""
    half, extra = x.shape[-1] // 2, (1,) * (x.ndim - 2)
    ones = np.eye(half, dtype=np.float32)
    swap_HH = np.block([[np.zeros_like(ones), ones], [-ones, np.zeros_like(ones)]])
    turned = jax.lax.dot_general(
        x,
        jnp.asarray(swap_HH, x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    cos, sin = (
        jnp.concatenate([part_TH, part_TH], axis=-1).reshape(x.shape[0], *extra, 2 * half)
        for part_TH in angles
    )
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def _rotate(x: Array, angles: RopeAngles) -> Array:
    extra = (1,) * (x.ndim - 2)
    cos = angles.cos_TH.reshape(angles.cos_TH.shape[0], *extra, -1)
    sin = angles.sin_TH.reshape(cos.shape)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x.dtype)
