"""Which attention an engine gets on a device; devices that are not here are described to it."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.config.resolve import DeviceFacts, ModelFacts, resolve
from jaxinfer.errors import ConfigError
from jaxinfer.models.base import ModelDef
from jaxinfer.models.registry import define_model
from jaxinfer.runner import kernels as kernels_module
from jaxinfer.runner.kernels import choose_engine_kernels
from jaxinfer.weights.reader import open_checkpoint
from pallas_kernels.paged_attention import xla
from tests.runner.tiny_llama import TinyLlama


@dataclass(frozen=True, kw_only=True)
class FarDevice:
    """What the choice asks of a `jax.Device`."""

    platform: str
    device_kind: str
    compute_capability: str = ""
    core_count: int = 132
    num_cores: int = 1
    client: Any = field(default_factory=lambda: SimpleNamespace(platform_version="12.8"))


AMPERE = FarDevice(platform="cuda", device_kind="NVIDIA A100", compute_capability="8.0")
TURING = FarDevice(platform="cuda", device_kind="Tesla T4", compute_capability="7.5")
TPU = FarDevice(platform="tpu", device_kind="TPU v6 lite")


@pytest.fixture(scope="module")
def definition(tmp_path_factory: pytest.TempPathFactory) -> ModelDef:
    """Its heads are of 8: too small for any kernel but XLA's."""
    path = TinyLlama().save(tmp_path_factory.mktemp("model"))
    return define_model(open_checkpoint(path).config(), tensor=1)


def choose(definition: ModelDef, device: Any, **settings: Any):
    platform = "gpu" if device.platform == "cuda" else device.platform
    facts = DeviceFacts(
        platform=platform, device_kind=device.device_kind, num_devices=1, memory_bytes=2**33
    )
    config = engine_config_from_kwargs(**settings)
    config = resolve(
        config, ModelFacts(max_position_embeddings=128, dtype="bfloat16"), facts
    ).config
    return choose_engine_kernels(config, definition, device)


def test_xla_asked_for_on_a_cpu_leaves_the_cpp_products(definition: ModelDef):
    kernels = choose(definition, jax.devices()[0], attention_backend="xla")
    assert kernels.attention_backend == "xla"
    assert kernels.paged_attention is xla.paged_attention
    assert kernels.reasons[0] == "paged_attention: XLA ops, as asked for"
    plain = choose(definition, jax.devices()[0])
    assert kernels.matmul == plain.matmul


@pytest.mark.parametrize(
    ("device", "name", "reason"),
    [
        (jax.devices()[0], "native", "head size 8 is not a multiple of 32"),
        (TPU, "pallas_tpu", "head size 8 is no multiple of 64"),
        (AMPERE, "mosaic_gpu", "needs compute capability 9.0, this is 8.0"),
        (AMPERE, "triton", "it has no head size of 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_asked_for_and_cannot_be_had_is_refused(
    definition: ModelDef, device: Any, name: str, reason: str
):
    with pytest.raises(ConfigError, match=f"attention_backend='{name}' cannot be had here") as e:
        choose(definition, device, attention_backend=name)
    assert reason in str(e.value)


@pytest.mark.parametrize(
    ("device", "name"), [(TURING, "auto"), (AMPERE, "auto"), (AMPERE, "xla"), (TPU, "auto")]
)
def test_xla_needs_no_check(
    definition: ModelDef, device: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    """AMPERE on auto: no other implementation has heads of 8."""
    monkeypatch.setattr(kernels_module, "ChildCheck", lambda **_: pytest.fail)
    assert choose(definition, device, attention_backend=name).attention_backend == "xla"


def test_on_a_gpu_the_choice_is_checked_and_the_verdict_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Here the check runs without a GPU: what it rejects is passed over, and not tried again."""
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    path = TinyLlama(head_dim=16).save(tmp_path / "model")
    definition = define_model(open_checkpoint(path).config(), tensor=1)
    kernels = choose(definition, AMPERE)
    assert kernels.attention_backend == "xla"
    assert "not triton: its check failed" in kernels.reasons[0]
    assert "(triton): failed: it does not run" in kernels.verdicts[0]
    (verdict,) = (tmp_path / "cache" / "kernel-checks").iterdir()
    written = verdict.stat().st_mtime_ns
    assert choose(definition, AMPERE).reasons == kernels.reasons
    assert verdict.stat().st_mtime_ns == written
