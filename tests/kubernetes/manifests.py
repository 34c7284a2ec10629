"""Reads the manifests under configs/kubernetes and finds what is in them. Knows no schema."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parent.parent.parent
DIRECTORY = ROOT / "configs/kubernetes"
NO_MANIFESTS = {"common/prometheus-adapter.yaml"}  # values of a chart


class Manifest(NamedTuple):
    """A file's one document."""

    path: str  # below configs/kubernetes
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.content["kind"]

    @property
    def name(self) -> str:
        return self.content["metadata"]["name"]


@cache
def manifests() -> tuple[Manifest, ...]:
    found = []
    for path in sorted(DIRECTORY.rglob("*.yaml")):
        name = path.relative_to(DIRECTORY).as_posix()
        if name not in NO_MANIFESTS:
            found.append(Manifest(name, yaml.safe_load(path.read_text(encoding="utf-8"))))
    return tuple(found)


def of_kind(*kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests() if manifest.kind in kinds]


def pod_template(manifest: Manifest) -> dict[str, Any]:
    """The pods of a Deployment or of a LeaderWorkerSet."""
    spec = manifest.content["spec"]
    if manifest.kind == "LeaderWorkerSet":
        return spec["leaderWorkerTemplate"]["workerTemplate"]
    return spec["template"]


def pods() -> list[Manifest]:
    return of_kind("Deployment", "LeaderWorkerSet")


def container(manifest: Manifest) -> dict[str, Any]:
    """The one that serves."""
    if manifest.kind == "ServingRuntime":
        (only,) = manifest.content["spec"]["containers"]
    else:
        (only,) = pod_template(manifest)["spec"]["containers"]
    return only


def flags(args: list[str]) -> dict[str, str]:
    """--name=value of a container's arguments."""
    pairs = (arg.removeprefix("--").split("=", 1) for arg in args if arg.startswith("--"))
    return dict(pairs)


def resources_of(kustomization: Manifest) -> Iterator[Path]:
    """The files and directories that a kustomization includes."""
    for resource in kustomization.content["resources"]:
        yield (DIRECTORY / kustomization.path).parent / resource
