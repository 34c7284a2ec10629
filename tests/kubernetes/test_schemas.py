"""Each manifest is valid: Kubernetes' kinds by its published schemas, the others by schemas/."""

import copy
import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from tests.kubernetes.manifests import Manifest, container, manifests

VERSIONS = ("1.30.0", "1.34.0")  # of Kubernetes: the oldest that takes the manifests, a recent one
OWN_SCHEMAS = Path(__file__).parent / "schemas"


def published(name: str, version: str) -> dict[str, Any]:
    """The strict form: unknown fields are errors."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@cache
def definitions(version: str) -> Registry:
    resource = Resource.from_contents(published("_definitions", version))
    return resource @ Registry()


@cache
def validator(kind: str, api_version: str, version: str) -> Draft202012Validator:
    own = OWN_SCHEMAS / f"{kind.lower()}.yaml"
    if own.exists():
        schema = yaml.safe_load(own.read_text(encoding="utf-8"))
        schema["$id"] = f"https://kubernetes.io/api/own/{kind}"  # what their $ref are relative to
    else:
        group, _, number = api_version.rpartition("/")
        name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], number)))
        schema = published(name, version)
    return Draft202012Validator(schema, registry=definitions(version))


def validate(content: dict[str, Any], version: str = VERSIONS[-1]) -> None:
    validator(content["kind"], content["apiVersion"], version).validate(content)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", manifests(), ids=lambda manifest: manifest.path)
def test_valid(manifest: Manifest, version: str):
    validate(manifest.content, version)


def misspell_a_field_of_the_container(manifest: Manifest) -> None:
    container(manifest)["livenessprobe"] = container(manifest).pop("livenessProbe")


def give_a_port_as_text(manifest: Manifest) -> None:
    container(manifest)["ports"][0]["containerPort"] = "8000"


def misspell_a_field_of_the_object(manifest: Manifest) -> None:
    manifest.content["spec"]["Replicas"] = 1


def forget_what_is_required(manifest: Manifest) -> None:
    spec = manifest.content["spec"]
    for field in ("selector", "leaderWorkerTemplate", "containers"):
        spec.pop(field, None)


@pytest.mark.parametrize("kind", ["Deployment", "LeaderWorkerSet", "ServingRuntime"])
@pytest.mark.parametrize(
    "damage",
    [
        misspell_a_field_of_the_container,
        give_a_port_as_text,
        misspell_a_field_of_the_object,
        forget_what_is_required,
    ],
)
def test_what_is_wrong_is_found(damage: Callable[[Manifest], None], kind: str):
    sound = next(manifest for manifest in manifests() if manifest.kind == kind)
    broken = copy.deepcopy(sound)
    damage(broken)
    with pytest.raises(ValidationError):
        validate(broken.content)
