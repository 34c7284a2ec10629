"""`jaxinfer info`: versions, devices, caches, and what is enabled or why not.

Imports JAX when it runs: asking for the devices is the point of it.
"""

import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxinfer.cli.parser import Parser
from jaxinfer.config.env import cache_dir
from jaxinfer.config.validate import MISSING

_PACKAGES = (
    "jaxinfer",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "aiohttp",
    "pyzmq",
    "msgspec",
)
_PLUGINS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin"),
}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import jax

    from jaxinfer.runner.memory import available_cpu_bytes

    try:
        devices = jax.local_devices()
    except RuntimeError as error:  # a plugin is installed but its device is absent or busy
        return {"error": str(error)}
    first = devices[0]
    stats = first.memory_stats() or {}
    # A CPU's memory is shared with all else: what counts is what can be had now.
    memory = available_cpu_bytes() if first.platform == "cpu" else stats.get("bytes_limit")
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": len(devices),
        "memory_bytes": memory,
    }


def _accelerators(found: str | None) -> dict[str, str]:
    states = {}
    for name, plugins in _PLUGINS.items():
        installed = [plugin for plugin in plugins if _version(plugin)]
        if found == name:
            states[name] = "in use"
        elif installed:
            states[name] = f"{installed[0]} is installed, but JAX found no such device"
        else:
            states[name] = f"no plugin installed: pip install 'jaxinfer[{name}]'"
    return states


def _bytes_under(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def collect() -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    devices = _devices()
    root = cache_dir()
    return {
        "versions": {"python": platform.python_version()}
        | {package: _version(package) or "not installed" for package in _PACKAGES},
        "system": platform.platform(),
        "devices": devices,
        "accelerators": _accelerators(devices.get("platform")),
        "cache": {
            "directory": str(root),
            "models_bytes": _bytes_under(root / "models"),
            "compiled_bytes": _bytes_under(root / "compiled"),
        },
        "not_supported_yet": {missing.name: missing.why for missing in MISSING},
    }


def _print_section(title: str, rows: dict[str, Any]) -> None:
    print(f"{title}:")
    shown = {
        name.removesuffix("_bytes"): (
            f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") and value is not None else value
        )
        for name, value in rows.items()
    }
    width = max(map(len, shown))
    for name, value in shown.items():
        print(f"  {name:<{width}}  {value}")


def run(argv: Sequence[str]) -> int:
    """Prints; 1 when JAX can use no device at all."""
    parser = Parser(prog="jaxinfer info", description="Versions, devices, caches.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse(argv)
    facts = collect()
    if args.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
    else:
        for name, rows in facts.items():
            title = name.replace("_", " ")
            if isinstance(rows, dict):
                _print_section(title, rows)
            else:
                print(f"{title}: {rows}")
    return 1 if "error" in facts["devices"] else 0
