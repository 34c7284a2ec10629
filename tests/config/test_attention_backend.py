"""--attention-backend: each platform takes what it has and refuses the rest by name."""

import pytest

from jaxinfer.config.fields import flatten
from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.config.resolve import ATTENTION_BACKENDS, DeviceFacts, ModelFacts, resolve
from jaxinfer.config.validate import validate
from jaxinfer.errors import ConfigError

MODEL = ModelFacts(max_position_embeddings=2048, dtype="bfloat16")
NAMES = ("auto", "native", "xla", "pallas_tpu", "mosaic_gpu", "triton")


@pytest.mark.parametrize("platform", ATTENTION_BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_platform_has_is_taken_and_the_rest_refused(platform: str, name: str):
    device = DeviceFacts(
        platform=platform, device_kind=f"a {platform}", num_devices=1, memory_bytes=2**33
    )
    config = engine_config_from_kwargs(attention_backend=name)
    if name in ("auto", *ATTENTION_BACKENDS[platform]):
        assert flatten(resolve(config, MODEL, device).config)["attention_backend"] == name
        return
    with pytest.raises(
        ConfigError, match=f"attention_backend='{name}' is not for '{platform}'"
    ) as e:
        resolve(config, MODEL, device)
    for there in ATTENTION_BACKENDS[platform]:
        assert there in str(e.value)


def test_a_name_of_vllms_is_answered_with_ours():
    with pytest.raises(ConfigError, match="attention_backend: expected one of .*mosaic_gpu"):
        engine_config_from_kwargs(attention_backend="FLASHINFER")


def test_native_attention_without_native_kernels_is_a_contradiction():
    with pytest.raises(ConfigError, match="'native' contradicts native_kernels=False"):
        validate(engine_config_from_kwargs(attention_backend="native", native_kernels=False))
