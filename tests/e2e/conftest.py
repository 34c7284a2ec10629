"""One small real server for all tests of this folder that do not need settings of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfer.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.e2e.api import Api, serving
from tests.e2e.tiny_model import write_tiny_model

MAX_MODEL_LEN, MAX_NUM_SEQS = 256, 8
# One mixed shape and one decode shape: the fewest programs to compile.
SMALL_FLAGS = (
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
    *("--max-num-batched-tokens", "64", "--token-buckets", "64"),
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def api(tiny_model: Path) -> Iterator[Api]:
    """The server; its model is called "tiny" and "alias"."""
    with serving(
        tiny_model, *SMALL_FLAGS, "--served-model-name", "tiny", "--served-model-name", "alias"
    ) as server:
        yield server
