"""Each small tokenizer twice: ours, and transformers' reading of the same directory."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxinfer.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.makers import MAKERS, save


@dataclass(frozen=True, kw_only=True)
class Pair:
    name: str
    ours: Tokenizer
    theirs: PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: _pair(name, save(make(), root / name)) for name, make in MAKERS.items()}


def _pair(name: str, directory: Path) -> Pair:
    return Pair(
        name=name,
        ours=load_tokenizer(directory),
        theirs=AutoTokenizer.from_pretrained(str(directory)),
    )


@pytest.fixture(params=MAKERS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]
