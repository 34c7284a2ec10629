"""The architecture, checked on the source: imports point down, the environment has one reader.

Imports under TYPE_CHECKING and inside functions count: a dependency is one wherever it stands.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "jaxinfer").rglob("*.py"))
KERNEL_SOURCES = sorted((ROOT / "pallas_kernels").rglob("*.py"))

LAYERS = {
    "errors": 0,
    "logging": 0,
    "core": 0,
    "config": 1,
    "parallel": 2,
    "quant": 2,
    "kv_cache": 2,
    "tokenizer": 2,
    "layers": 3,
    "scheduler": 3,
    "models": 4,
    "weights": 5,
    "sampling": 5,
    "runner": 6,
    "engine": 7,
    "batch": 8,
    "compress": 8,
    "planner": 8,
    "bench": 8,
    "server": 9,
    "cli": 10,
}
"""Layer of each package (docs/architecture.md); a package imports lower ones and itself."""

BELOW_ALL = {"errors": -2, "logging": -1}  # modules at the root that even core may import

NO_JAX_PACKAGES = (
    *("core", "config", "kv_cache", "tokenizer", "scheduler"),
    *("batch", "bench", "server", "cli"),
)
NO_JAX_MODULES = (
    "jaxinfer",
    "jaxinfer.engine.client",
    "jaxinfer.engine.async_engine",
    "jaxinfer.engine.model_source",
    "jaxinfer.engine.offline",
    "jaxinfer.engine.output_processor",
    "jaxinfer.weights.hub",
    "jaxinfer.weights.catalogue",
)
HEAVY = ("jax", "jaxlib", "flax", "torch", "tensorflow")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; `from a import b` also gives a.b, which may be a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def package_of(module: str) -> str | None:
    """The first part below jaxinfer; None for other packages and for jaxinfer itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "jaxinfer" and len(parts) > 1 else None


def layer_of(package: str) -> int:
    return BELOW_ALL.get(package, LAYERS[package])


def test_every_package_has_a_layer():
    for path in SOURCES:
        package = package_of(module_name(path))
        assert package is None or package in LAYERS, f"{path}: say its layer in {__file__}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    own = package_of(module_name(path))
    if own is None:
        return  # jaxinfer/__init__.py offers the public names of all layers
    for line, module in imported_modules(path):
        other = package_of(module)
        if other is None or other == own or other not in LAYERS:
            continue  # `from jaxinfer.core import step` names both jaxinfer.core and its step
        assert layer_of(other) < layer_of(own), (
            f"{path}:{line}: {own} (layer {LAYERS[own]}) imports {module} (layer {LAYERS[other]})"
        )


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_stand_alone(path: Path):
    for line, module in imported_modules(path):
        assert module.split(".")[0] != "jaxinfer", f"{path}:{line}: imports {module}"


@pytest.mark.parametrize("path", SOURCES + KERNEL_SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_environment_and_private_jax(path: Path):
    if path == ROOT / "jaxinfer/config/env.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert text not in ("os.environ", "os.getenv", "os.putenv"), f"{path}:{node.lineno}"
            assert not text.startswith("jax._src"), f"{path}:{node.lineno}: {text}"
    for line, module in imported_modules(path):
        assert not module.startswith("jax._src"), f"{path}:{line}: {module}"
        assert module not in ("os.environ", "os.getenv"), f"{path}:{line}: {module}"


def test_subpackages_have_empty_init_files():
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent != ROOT / "jaxinfer":
            assert path.read_text() == "", f"{path} is not empty: import from the modules"


def no_jax_modules() -> list[str]:
    names = [module_name(path) for path in SOURCES]
    inside = [name for name in names if package_of(name) in NO_JAX_PACKAGES]
    return sorted({*inside, *(name for name in NO_JAX_MODULES if name in names)})


def test_no_jax_in_the_http_process():
    script = f"""
import importlib, sys
for name in {no_jax_modules()!r}:
    importlib.import_module(name)
    heavy = [module for module in {HEAVY!r} if module in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-2000:]
