"""The public names, pinned: taking one away breaks users."""

import subprocess
import sys

import jaxinfer

PUBLIC = {
    "AsyncEngine",
    "CompletionOutput",
    "LLM",
    "RequestOutput",
    "SamplingParams",
    "__version__",
}


def test_public_names_are_exactly_these():
    assert set(jaxinfer.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(jaxinfer, name) is not None
    assert set(dir(jaxinfer)) >= PUBLIC


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert jaxinfer.__version__ == version("jaxinfer")


def test_importing_the_package_and_its_names_imports_no_jax():
    script = (
        "import sys, jaxinfer\n"
        "assert not [name for name in ('jax', 'numpy', 'tokenizers') if name in sys.modules]\n"
        "from jaxinfer import *\n"
        "from jaxinfer import AsyncEngine, LLM, SamplingParams\n"
        "assert 'jax' not in sys.modules and 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
