"""Builds the container images and tries them: scripts/check_containers [OPTIONS].

For each image: build time and size; that its last stage has no compiler; that a user whom the image
does not know reads all of /opt/jaxinfer and writes none of it; that the server, started as that
user with the image's own entry point, becomes healthy and ready, completes a prompt with a real
model on the CPU, and ends with 0 at SIGTERM. The TPU image serves on the CPU too: what the check
cannot say is whether libtpu works on a TPU.

Needs root and buildah, no registry: without --base-image, a base is made of Debian's packages with
debootstrap. Knows the Containerfiles; it imports nothing of jaxinfer.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BASE = "localhost/jaxinfer-base"
DEBIAN = "trixie"
USER = "12345:0"  # as OpenShift does: a user that no image knows, of group 0
CACHE = "/var/cache/jaxinfer"
PID_FILE = "/check/pid"  # chroot isolation shows it this machine's process ids
SMALL = ["--max-num-seqs", "4", "--max-num-batched-tokens", "64"]  # less to compile
PROMPT = "The capital of France is"
COMPILERS = "cc gcc c++ g++ cpp clang clang++ as ld make cmake rustc cargo go nvcc hipcc"
START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 30.0
LOG_LINES_SHOWN = 30


class Variant(NamedTuple):
    """An image: its Containerfile, and the extra that decides what JAX runs on."""

    file: str
    extra: str


VARIANTS = {
    "cpu": Variant("Containerfile.gpu", "cpu"),
    "gpu": Variant("Containerfile.gpu", "gpu"),
    "tpu": Variant("Containerfile.tpu", "tpu"),
}


class CheckError(Exception):
    """An image is not what it should be; the text says how."""


def run(*command: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def make_base() -> str:
    """A Debian with Python and nothing else, from packages; made once."""
    if subprocess.run(["buildah", "inspect", BASE], capture_output=True).returncode == 0:
        return BASE
    need("debootstrap")
    with tempfile.TemporaryDirectory() as scratch:
        packages = "--include=python3,ca-certificates"
        run("debootstrap", "--variant=minbase", packages, DEBIAN, f"{scratch}/root")
        container = run("buildah", "from", "scratch")
        run("buildah", "add", "--quiet", container, f"{scratch}/root", "/")
        run("buildah", "commit", "--quiet", "--rm", container, BASE)
    return BASE


def need(program: str) -> None:
    if shutil.which(program) is None:
        raise CheckError(f"{program} is not installed (Debian, Ubuntu: apt-get install {program})")


def build(name: str, base: str) -> str:
    """The image's name. What pip needs to trust an index comes from $SSL_CERT_FILE, if set."""
    variant, image = VARIANTS[name], f"localhost/jaxinfer:{name}"
    command = ["buildah", "build", "--isolation", "chroot", "--format", "docker", "--layers"]
    command += ["--file", variant.file, "--tag", image]
    command += ["--build-arg", f"BASE_IMAGE={base}", "--build-arg", f"JAX_EXTRA={variant.extra}"]
    certificates = os.environ.get("SSL_CERT_FILE")
    if certificates:
        command += ["--volume", f"{certificates}:/etc/ssl/certs/ca-certificates.crt:ro"]
    began_s = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        built = subprocess.run([*command, "."], stdout=log, stderr=subprocess.STDOUT)
        if built.returncode != 0:
            log.seek(0)
            raise CheckError("the build failed:\n" + "".join(log.readlines()[-LOG_LINES_SHOWN:]))
    size = run("buildah", "images", "--format", "{{.Size}}", image)
    print(f"  built in {time.monotonic() - began_s:.0f} s, {size}")
    return image


@contextlib.contextmanager
def container_of(image: str) -> Iterator[str]:
    container = run("buildah", "from", image)
    try:
        yield container
    finally:
        run("buildah", "rm", container)


def in_container(container: str, *command: str, volumes: tuple[str, ...] = ()) -> list[str]:
    """The command line that runs a command in it as the unknown user."""
    mounts = [word for volume in volumes for word in ("--volume", volume)]
    return ["buildah", "run", "--isolation", "chroot", "--user", USER, *mounts, container, *command]


def check_files(container: str) -> None:
    """Raises CheckError for compilers, and for files with wrong permissions."""
    named = " ".join(f"-name {program} -o" for program in COMPILERS.split()).removesuffix(" -o")
    forbidden = {
        "has compilers": f"find / -xdev \\( {named} \\) ! -type d -executable",
        "has files that its user cannot read": "find /opt/jaxinfer ! -readable",
        "has code that its user can change": "find /opt/jaxinfer -writable ! -type l",
    }
    for what, find in forbidden.items():
        found = run(*in_container(container, "sh", "-c", f"{find} 2>/dev/null; true"))
        if found:
            raise CheckError(f"the image {what}: {' '.join(found.split()[:5])} ...")
    run(
        *in_container(container, "sh", "-c", f"touch {CACHE}/.try ~/.try && rm {CACHE}/.try ~/.try")
    )
    print("  no compiler; code is readable and not writable, cache and home are writable")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(url: str, body: dict | None = None) -> tuple[int, dict]:
    """Status and JSON; status 0 while nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, {}
    except OSError:
        return 0, {}


def check_server(image: str, container: str, model: Path | None) -> None:
    """Starts what the image says, on loopback, and stops it. Raises CheckError."""
    config = json.loads(run("buildah", "inspect", "--type", "image", image))["Docker"]["config"]
    port = free_port()  # the container has this machine's network
    command = ["sh", "-c", f'echo $$ >{PID_FILE} && exec "$@"', "sh"]
    command += [*config["Entrypoint"], *config["Cmd"], "--host", "127.0.0.1", "--port", str(port)]
    command += SMALL
    volumes = []
    if model is not None:
        volumes.append(f"{model.parent if model.is_file() else model}:/model:ro")
        command += ["--model", f"/model/{model.name}" if model.is_file() else "/model"]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as log:
        Path(scratch).chmod(0o775)
        volumes.append(f"{scratch}:{Path(PID_FILE).parent}")
        server = subprocess.Popen(
            in_container(container, *command, volumes=tuple(volumes)),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            use_server(server, f"http://127.0.0.1:{port}")
            kind, *check = config["Healthcheck"]["Test"]
            assert kind == "CMD", "the exec form"
            run(*in_container(container, *(word.replace("8000", str(port)) for word in check)))
            stop_server(server, int((Path(scratch) / Path(PID_FILE).name).read_text()))
        except CheckError as error:
            log.seek(0)
            shown = "".join(log.readlines()[-LOG_LINES_SHOWN:])
            raise CheckError(f"{error}\n{shown}") from None
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)  # buildah and what it runs
                server.wait()


def use_server(server: subprocess.Popen, url: str) -> None:
    began_s = time.monotonic()
    while (status := fetch(f"{url}/ready")[0]) != 200:
        if server.poll() is not None:
            raise CheckError(f"the server ended with {server.returncode} while it started")
        if time.monotonic() - began_s > START_TIMEOUT_S:
            raise CheckError(f"/ready is still {status} after {START_TIMEOUT_S:.0f} s")
        time.sleep(0.5)
    ready_s = time.monotonic() - began_s
    if fetch(f"{url}/health")[0] != 200:
        raise CheckError("/ready is 200 but /health is not")
    _, models = fetch(f"{url}/v1/models")
    name = models["data"][0]["id"]
    body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    status, answer = fetch(f"{url}/v1/completions", body)
    if status != 200 or not answer["choices"][0]["text"].strip():
        raise CheckError(f"a completion was answered with {status} {answer}")
    print(f"  ready in {ready_s:.1f} s; {PROMPT!r} -> {answer['choices'][0]['text']!r}")


def stop_server(server: subprocess.Popen, pid: int) -> None:
    """The process itself gets the signal (buildah hands none on), and buildah its exit status."""
    os.kill(pid, signal.SIGTERM)
    try:
        code = server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CheckError(f"it still runs {STOP_TIMEOUT_S:.0f} s after SIGTERM") from None
    if code != 0:
        raise CheckError(f"SIGTERM ended it with {code}")
    print("  SIGTERM ended it with 0")


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the container images and tries them.")
    parser.add_argument(
        "variants", nargs="*", default=["cpu", "tpu"], help=f"of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--base-image", help="with Python >= 3.11 (default: one is made)")
    parser.add_argument("--model", type=Path, help="directory or .gguf file (default: a download)")
    args = parser.parse_args()
    unknown = set(args.variants) - VARIANTS.keys()
    if unknown:
        parser.error(f"variants are {', '.join(VARIANTS)}, not {', '.join(sorted(unknown))}")
    try:
        need("buildah")
        base = args.base_image or make_base()
        for name in args.variants:
            print(f"{name}: {VARIANTS[name].file}, JAX_EXTRA={VARIANTS[name].extra}", flush=True)
            image = build(name, base)
            with container_of(image) as container:
                check_files(container)
                check_server(image, container, args.model and args.model.resolve())
    except (CheckError, subprocess.CalledProcessError) as error:
        print(f"scripts/check_containers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
