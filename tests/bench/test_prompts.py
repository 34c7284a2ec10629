"""Where prompts come from."""

import json
import random
from pathlib import Path

import pytest

from jaxinfer.bench.prompts import PromptSource, load_prompts
from jaxinfer.bench.workloads import PEERS, Workload, check_fits, random_prompts
from jaxinfer.errors import ConfigError

RANDOM = {"dataset": "random", "path": None, "input_len": 6, "output_len": 3, "vocab_size": 500}


def source(**fields) -> PromptSource:
    return PromptSource(**{**RANDOM, "seed": 0, **fields})


def test_prompts_are_those_other_engines_get():
    rng = random.Random(0)
    expected = [[rng.randrange(100, 49000) for _ in range(16)] for _ in range(4)]
    assert random_prompts(4, 16, vocab_size=49152, seed=0) == expected


def test_prompts_fit_a_small_vocabulary():
    for vocab_size in (1, 50, 101, 500):
        prompts = random_prompts(2, 50, vocab_size=vocab_size, seed=0)
        assert all(0 <= token < vocab_size for prompt in prompts for token in prompt)


def test_peers_list():
    assert PEERS[0] == (1, 16, 128)
    assert len(set(PEERS)) == 6


def test_a_workload_must_fit():
    check_fits(Workload(1, 60, 4), 64)
    with pytest.raises(ConfigError, match="--max-model-len"):
        check_fits(Workload(1, 61, 4), 64)


def test_random_token_ids():
    prompts = load_prompts(source(), 5, "/v1/completions", salt=0)
    assert [len(prompt.content) for prompt in prompts] == [6] * 5
    assert all(type(token) is int for prompt in prompts for token in prompt.content)
    assert prompts == load_prompts(source(), 5, "/v1/completions", salt=0)
    assert prompts != load_prompts(source(), 5, "/v1/completions", salt=1)
    assert prompts != load_prompts(source(seed=1), 5, "/v1/completions", salt=0)


def test_random_words_for_chat():
    prompts = load_prompts(source(), 5, "/v1/chat/completions", salt=0)
    contents = [prompt.content for prompt in prompts]
    assert all(isinstance(text, str) and len(text.split()) == 6 for text in contents)
    assert len(set(map(str, contents))) == 5


def test_a_prompt_a_line(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n two \n", encoding="utf-8")
    found = load_prompts(source(dataset="prompts", path=path), 3, "/v1/completions", salt=0)
    assert [prompt.content for prompt in found] == ["one", " two ", "one"]
    more = load_prompts(source(dataset="prompts", path=path), 3, "/v1/completions", salt=1)
    assert [prompt.content for prompt in more] == [" two ", "one", " two "]
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "x": 1}\n', encoding="utf-8")
    found = load_prompts(source(dataset="prompts", path=path), 2, "/v1/completions", salt=0)
    assert [prompt.content for prompt in found] == ["a", "b"]


def test_sharegpt(tmp_path: Path):
    path = tmp_path / "sharegpt.json"
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]
    entries = [
        {"conversations": [*turns, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "gpt", "value": "only an answer"}]},
        {},
    ]
    path.write_text(json.dumps(entries), encoding="utf-8")
    found = load_prompts(source(dataset="sharegpt", path=path), 2, "/v1/completions", salt=0)
    assert [prompt.content for prompt in found] == ["q", "q"]


@pytest.mark.parametrize(
    ("dataset", "text"),
    [("sharegpt", "no json"), ("sharegpt", '["text"]'), ("sharegpt", "[]"), ("prompts", "\n")],
)
def test_a_file_that_is_none(tmp_path: Path, dataset: str, text: str):
    path = tmp_path / "file"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="--dataset-path"):
        load_prompts(source(dataset=dataset, path=path), 1, "/v1/completions", salt=0)


def test_bad_sources(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs --dataset-path"):
        source(dataset="prompts")
    with pytest.raises(ConfigError, match="not read with --dataset=random"):
        source(path=tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(source(dataset="prompts", path=tmp_path / "no"), 1, "/v1/completions", salt=0)
