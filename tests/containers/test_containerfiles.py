"""The Containerfiles, read as text. (scripts/check_containers builds them and runs the images.)"""

import difflib
import fnmatch
import json
import re
import subprocess
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jaxinfer.config.env import cache_dir
from jaxinfer.config.schema import ServerConfig
from tests.containers.containerfile import CONTAINERFILES, ROOT, instructions, last_stage, stages

LOCK = ROOT / "configs/containers/constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

each_file = pytest.mark.parametrize("file", CONTAINERFILES, ids=lambda path: path.name)


def pins() -> dict[str, str]:
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==", 1) for line in lines if not line.startswith("#"))
    return dict(pairs)


@each_file
def test_the_base_is_an_argument_of_both_stages(file: Path):
    arguments, builder, last = stages(file)
    (base,) = arguments.all("ARG")
    assert re.fullmatch(r"BASE_IMAGE=\S+:\S+", base)
    assert not base.endswith(":latest")
    assert (builder.base, last.base) == ("${BASE_IMAGE} AS builder", "${BASE_IMAGE}")


@each_file
def test_the_last_stage_installs_nothing(file: Path):
    last = last_stage(file)
    for command in last.all("RUN"):
        assert not re.search(r"apt|dnf|pip|install|curl|wget", command), command
    assert last.all("COPY") == ["--from=builder /opt/jaxinfer /opt/jaxinfer"]


@each_file
def test_any_user_may_run_it(file: Path):
    last = last_stage(file)
    uid, gid = last.one("USER").value.split(":")
    assert int(uid) > 0  # a number: Kubernetes cannot check a name for runAsNonRoot
    assert gid == "0"
    written = {last.environment()["JAXINFER_CACHE"], last.environment()["HOME"]}
    (made,) = last.all("RUN")
    for directory in written:
        assert re.search(rf"chmod 2775 .*{directory}\b", made), "not writable for the group"
    assert last.one("VOLUME").words() == [last.environment()["JAXINFER_CACHE"]]


@each_file
def test_the_environment_is_what_the_engine_reads(file: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in last_stage(file).environment().items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path("/var/cache/jaxinfer")


@each_file
def test_signals_reach_the_server(file: Path):
    """The exec form: no shell in between. And what runs may end before an engine kills it."""
    last = last_stage(file)
    assert last.one("ENTRYPOINT").words() == ["jaxinfer"]
    command = last.one("CMD").words()
    assert command[:3] == ["serve", "--host", "0.0.0.0"]
    drain_s = float(command[command.index("--shutdown-timeout") + 1])
    assert 0 < drain_s < 10  # what Docker and Podman wait
    assert last.one("STOPSIGNAL").value == "SIGTERM"
    assert last.one("EXPOSE").value == str(ServerConfig().port)


@each_file
def test_the_health_check_asks_the_server(file: Path):
    check = last_stage(file).one("HEALTHCHECK").value
    assert f"'127.0.0.1', {ServerConfig().port}" in check
    options, command = check.split(" CMD ", 1)
    assert "--start-period" in options
    program, flag, source = json.loads(command)
    assert (program, flag) == ("python", "-c")
    compile(source, "HEALTHCHECK", "exec")


@each_file
def test_labels(file: Path):
    labels = last_stage(file).pairs("LABEL")
    wanted = ("title", "description", "licenses", "version", "revision")
    assert {f"org.opencontainers.image.{name}" for name in wanted} <= labels.keys()
    assert f"VERSION={PROJECT['project']['version']}" in last_stage(file).all("ARG")
    assert labels["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]


def test_the_files_differ_in_the_accelerator_only():
    gpu, tpu = ([f"{i.name} {i.value}" for i in instructions(path)] for path in CONTAINERFILES)
    changes = [line for line in difflib.ndiff(gpu, tpu) if line[0] in "-+"]
    assert {line.split()[1] for line in changes} == {"ARG", "LABEL", "ENV"}
    extras = {line.split("=")[1] for line in changes if "JAX_EXTRA" in line}
    assert extras == {"gpu", "tpu"}
    assert extras <= PROJECT["project"]["optional-dependencies"].keys()


@each_file
def test_what_is_copied_exists_and_is_not_ignored(file: Path):
    patterns = (ROOT / ".containerignore").read_text(encoding="utf-8").splitlines()
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert "*" in patterns
    builder = stages(file)[1]
    sources = {word for copy in builder.all("COPY") for word in copy.split()[:-1]}
    assert all((ROOT / source).exists() for source in sources)
    assert sources == kept


def test_every_step_of_the_build_exists():
    script = (ROOT / "configs/containers/build_venv").read_text(encoding="utf-8")
    steps = set(re.findall(r"^(\w+)\(\) \{", script, re.M))
    for file in CONTAINERFILES:
        used = re.findall(r"build_venv (\w+)", "\n".join(stages(file)[1].all("RUN")))
        assert used == ["tools", "dependencies", "package"]
        assert set(used) <= steps
    subprocess.run(["sh", "-n", ROOT / "configs/containers/build_venv"], check=True)


def test_constraints_pin_what_the_project_asks_for():
    """All that pyproject.toml names for an image stands in the lock, in a version that it takes."""
    extras = PROJECT["project"]["optional-dependencies"]
    named = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    named += [line for extra in ("cpu", "tpu", "gpu", "rocm", "batch") for line in extras[extra]]
    for requirement in map(Requirement, named):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert pins()[name] in requirement.specifier, (
            f"{requirement}: run scripts/lock_containers.py"
        )
    assert all(re.fullmatch(r"[\w.]+", pin) for pin in pins().values())


def test_plugins_fit_the_jax_that_is_pinned():
    """libtpu's version is JAX's to say; that of the CUDA and ROCm plugins is JAX's own."""
    locked = pins()
    assert locked["jaxlib"] == locked["jax"]
    for plugin in ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-rocm7-plugin", "jax-rocm7-pjrt"):
        assert locked[plugin] == locked["jax"]
    if version("jax") == locked["jax"]:
        wanted = map(Requirement, requires("jax") or [])
        (libtpu,) = (each for each in wanted if each.name == "libtpu")
        assert locked["libtpu"] in libtpu.specifier


def test_the_wheel_has_all_that_the_packages_read():
    """The images install a wheel: a header that is missing there costs the C++ kernels silently."""
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package
        ignored = ("shipped", "__pycache__")
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() or path.suffix == ".py" or any(part in ignored for part in path.parts):
                continue
            plain = [pattern.replace("**/", "*") for pattern in patterns]
            assert any(fnmatch.fnmatch(name, pattern) for pattern in plain), f"{package}/{name}"
