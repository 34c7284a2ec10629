"""What no schema says: the manifests agree with each other, with the server and with the images."""

import re
from typing import Any

import pytest
import yaml

from jaxinfer.cli.serve import run as serve
from jaxinfer.config.schema import ServerConfig
from jaxinfer.core.messages import EngineStats
from jaxinfer.server.app import create_app_around
from jaxinfer.server.metrics import Metrics
from jaxinfer.server.state import ServerState
from tests.containers.containerfile import CONTAINERFILES, last_stage
from tests.engine.test_transport import INFO
from tests.kubernetes.manifests import (
    DIRECTORY,
    NO_MANIFESTS,
    Manifest,
    container,
    flags,
    manifests,
    of_kind,
    pod_template,
    pods,
    resources_of,
)

ACCELERATORS = ("nvidia.com/gpu", "amd.com/gpu", "google.com/tpu")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")

each_pod = pytest.mark.parametrize("manifest", pods(), ids=lambda manifest: manifest.path)
each_server = pytest.mark.parametrize(
    "manifest", [*pods(), *of_kind("ServingRuntime")], ids=lambda manifest: manifest.path
)


def pod_spec(manifest: Manifest) -> dict[str, Any]:
    if manifest.kind == "ServingRuntime":
        return manifest.content["spec"]
    return pod_template(manifest)["spec"]


@each_server
def test_the_server_takes_the_arguments(manifest: Manifest, capsys: pytest.CaptureFixture[str]):
    command, *arguments = container(manifest)["args"]
    assert command == "serve"
    assert serve([*arguments, "--dry-run"]) == 0
    assert "0.0.0.0" in capsys.readouterr().out  # else no probe and no request reaches it


def test_kserve_adds_arguments_that_the_server_takes(capsys: pytest.CaptureFixture[str]):
    (service,), (runtime,) = of_kind("InferenceService"), of_kind("ServingRuntime")
    model = service.content["spec"]["predictor"]["model"]
    arguments = [*container(runtime)["args"][1:], *model["args"]]
    assert serve([*arguments, "--dry-run"]) == 0
    assert model["runtime"] == runtime.name
    formats = runtime.content["spec"]["supportedModelFormats"]
    assert model["modelFormat"]["name"] in {entry["name"] for entry in formats}


@each_pod
def test_as_many_devices_as_the_arguments_say(manifest: Manifest):
    limits = container(manifest)["resources"]["limits"]
    (num_devices,) = (int(limits[name]) for name in ACCELERATORS if name in limits)
    spec = manifest.content["spec"]
    num_hosts = spec.get("leaderWorkerTemplate", {}).get("size", 1)
    wanted = flags(container(manifest)["args"])
    assert int(wanted.get("tensor-parallel-size", 1)) == num_devices * num_hosts
    topology = pod_spec(manifest).get("nodeSelector", {}).get("cloud.google.com/gke-tpu-topology")
    if topology is not None:
        rows, columns = map(int, topology.split("x"))
        assert rows * columns == num_devices * num_hosts


@each_server
def test_probes_ask_routes_that_exist(manifest: Manifest):
    app = create_app_around(ServerState(ServerConfig()))
    routes = {resource.canonical for resource in app.router.resources()}
    ports = container(manifest)["ports"]
    known = {port["containerPort"] for port in ports} | {port["name"] for port in ports}
    assert int(flags(container(manifest)["args"])["port"]) in known
    for probe in PROBES:
        request = container(manifest)[probe]["httpGet"]
        assert request["path"] in routes
        assert request["port"] in known
    assert container(manifest)["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container(manifest)["readinessProbe"]["httpGet"]["path"] == "/ready"


@each_server
def test_probes_leave_time_for_the_start_and_for_a_restarted_engine(manifest: Manifest):
    def patience_s(probe: str) -> int:
        return (
            container(manifest)[probe]["periodSeconds"]
            * container(manifest)[probe]["failureThreshold"]
        )

    assert patience_s("startupProbe") >= 1800
    assert patience_s("livenessProbe") > 2 * ServerConfig().engine_stall_timeout


@each_pod
def test_running_requests_may_end(manifest: Manifest):
    drain_s = float(flags(container(manifest)["args"])["shutdown-timeout"])
    sleep_s = container(manifest)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod_spec(manifest)["terminationGracePeriodSeconds"] >= sleep_s + drain_s + 10


@each_server
def test_restricted(manifest: Manifest):
    """The `restricted` level of Kubernetes' Pod Security Standards, but for volumes' kinds."""
    pod = pod_spec(manifest).get("securityContext", {})
    own = container(manifest)["securityContext"]
    assert (own | pod)["runAsNonRoot"] is True
    assert (own | pod)["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert not {"runAsUser", "runAsGroup"} & (own | pod).keys()  # OpenShift's to choose


@each_pod
def test_all_that_the_image_writes_is_a_volume(manifest: Manifest):
    assert container(manifest)["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"]: mount["name"] for mount in container(manifest)["volumeMounts"]}
    for file in CONTAINERFILES:
        environment = last_stage(file).environment()
        assert {environment["JAXINFER_CACHE"], environment["HOME"], "/tmp"} <= mounts.keys()
    volumes = {volume["name"]: volume for volume in pod_spec(manifest)["volumes"]}
    assert set(mounts.values()) == volumes.keys()
    claims = {claim.name for claim in of_kind("PersistentVolumeClaim")}
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] in claims


@pytest.mark.parametrize("service", of_kind("Service"), ids=lambda manifest: manifest.path)
def test_services_find_pods(service: Manifest):
    wanted = service.content["spec"]["selector"]
    set_by_controller = {"leaderworkerset.sigs.k8s.io/worker-index"}
    found = [
        manifest
        for manifest in pods()
        if wanted.items() - pod_template(manifest)["metadata"]["labels"].items()
        <= {(label, wanted.get(label)) for label in set_by_controller}
    ]
    assert found
    for manifest in found:
        names = {port["name"] for port in container(manifest)["ports"]}
        assert {port["targetPort"] for port in service.content["spec"]["ports"]} <= names


def test_deployments_select_their_own_pods():
    for manifest in of_kind("Deployment"):
        labels = pod_template(manifest)["metadata"]["labels"]
        assert manifest.content["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_route_leads_to_the_service():
    (route,) = of_kind("Route")
    services = {service.name: service.content["spec"]["ports"] for service in of_kind("Service")}
    ports = services[route.content["spec"]["to"]["name"]]
    target = route.content["spec"]["port"]["targetPort"]
    assert target in {port["name"] for port in ports}  # a route means the name of the service's


def test_the_autoscaler_reads_a_metric_that_the_server_has():
    (scaler,) = of_kind("HorizontalPodAutoscaler")
    spec = scaler.content["spec"]
    target = spec["scaleTargetRef"]
    assert (target["kind"], target["name"]) in {(pod.kind, pod.name) for pod in pods()}
    (metric,) = (entry["pods"]["metric"]["name"] for entry in spec["metrics"])
    adapter = yaml.safe_load((DIRECTORY / "common/prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["as"] == metric
    source = rule["name"]["matches"]
    assert f'__name__="{source}"' in rule["seriesQuery"]
    metrics, prefix = Metrics(), ServerConfig().metrics_prefix
    metrics.engine(prefix=prefix, model_name="any", info=INFO, stats=EngineStats)
    assert re.search(f"^# TYPE {source} gauge$", metrics.exposition().decode(), re.M)


def test_kustomizations_include_files_that_exist_and_none_is_left_out():
    included = set()
    for kustomization in of_kind("Kustomization"):
        for path in resources_of(kustomization):
            assert path.is_file() or (path / "kustomization.yaml").is_file(), path
            included.add(path.resolve())
    for manifest in manifests():
        alone = manifest.kind in ("Kustomization", "ServingRuntime", "InferenceService")
        assert alone or (DIRECTORY / manifest.path).resolve() in included, manifest.path
    assert all((DIRECTORY / name).is_file() for name in NO_MANIFESTS)


def test_kustomizations_name_the_images_that_the_pods_have():
    for kustomization in of_kind("Kustomization"):
        for image in kustomization.content.get("images", []):
            folder = (DIRECTORY / kustomization.path).parent
            used = {
                container(pod)["image"] for pod in pods() if (DIRECTORY / pod.path).parent == folder
            }
            assert used == {image["name"]}


def test_several_hosts_stay_off_until_the_server_can():
    """`jaxinfer serve` has no mode for several hosts: a group that was started would hang."""
    (group,) = of_kind("LeaderWorkerSet")
    assert group.content["spec"]["replicas"] == 0
