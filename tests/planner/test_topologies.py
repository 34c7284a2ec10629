"""Names of machines: what they stand for, and what is said of those that do not exist."""

import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.planner.topologies import SUGGESTED, family, parse_topology

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "num_devices", "usable_gib"),
    [
        ("v5e:2x4", 8, 15.75),
        ("v6e:1x1", 1, 31.25),
        ("tpu7x:2x2x1", 8, 94.75),  # two devices a chip
        ("v5p:2x2x2", 8, 95.74),
    ],
)
def test_tpus(name: str, num_devices: int, usable_gib: float):
    target = parse_topology(name)
    assert target.num_devices == num_devices
    assert target.chip.usable_bytes == int(usable_gib * GIB)


@pytest.mark.parametrize(
    ("name", "chip", "num_devices"),
    [
        ("h100", "h100", 1),
        ("h100x4", "h100", 4),
        ("a100-80gx8", "a100-80g", 8),
        ("b200", "b200", 1),
    ],
)
def test_gpus(name: str, chip: str, num_devices: int):
    target = parse_topology(name)
    assert (target.chip.name, target.num_devices) == (chip, num_devices)


def test_a_cpu_shares_its_memory():
    one, two = parse_topology("cpu"), parse_topology("cpux2")
    assert (one.num_devices, two.num_devices) == (1, 2)
    assert two.chip.usable_bytes == pytest.approx(one.chip.usable_bytes / 2, rel=0.05)
    assert one.chip.rates is None


@pytest.mark.parametrize("name", SUGGESTED)
def test_what_is_suggested_exists(name: str):
    assert parse_topology(name).name == name


@pytest.mark.parametrize("name", ["v6e", "v7x:2x2x1", "h100x", "rtx4090", "v6e:2x2x2x2", ""])
def test_unknown_names_list_the_known_ones(name: str):
    with pytest.raises(ConfigError, match=rf"topology='{name}' is not known.*v6e:2x4.*h100x8"):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v6e:2x2x1", "grids of 2 numbers, like v6e:2x2"),
        ("v5p:2x2", "grids of 3 numbers, like v5p:2x2x1"),
        ("v6e:3x4", "first two numbers must be even"),
        ("h100x0", "has 0 devices"),
        ("cpux0", "has 0 devices: give 1 to 1024"),
        ("v6e:64x64", "has 4096 devices: give 1 to 1024"),
    ],
)
def test_impossible_shapes(name: str, says: str):
    with pytest.raises(ConfigError, match=f"topology='{name}'.*{says}"):
        parse_topology(name)


def test_a_family_grows():
    names = [target.name for target in family(parse_topology("v6e:2x2"))]
    assert names == ["v6e:1x1", "v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8"]
    names = [target.name for target in family(parse_topology("h100x4"))]
    assert names == ["h100", "h100x2", "h100x4", "h100x8"]
    assert [target.name for target in family(parse_topology("cpux2"))] == ["cpux2"]
    for chip in ("v5e:1x1", "v5p:2x2x1", "tpu7x:1x1x1", "b200"):
        sizes = [target.num_devices for target in family(parse_topology(chip))]
        assert sizes == sorted(set(sizes))
