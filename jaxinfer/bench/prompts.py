"""The prompts of `bench serve`: random ones, or those of a file. Knows no server.

Random prompts for `/v1/completions` are token ids, so their length is exact for any tokenizer. Chat
takes text only: random words then, about one token each; what the server counted is reported.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxinfer.bench.client import Endpoint, Prompt
from jaxinfer.bench.workloads import random_prompts
from jaxinfer.errors import ConfigError

Dataset = Literal["random", "sharegpt", "prompts"]
DATASETS: tuple[Dataset, ...] = ("random", "sharegpt", "prompts")

# Common words that byte-pair vocabularies have whole, with the blank before them.
_WORDS = (
    "the of and to in is that it was for on are with they be at one have this from by hot but "
    "some what there we can out other were all your when up use word how said an each she which "
    "do their time if will way about many then them would write like so these her long make "
    "thing see him two has look more day could go come did my sound no most number who over "
    "know water than call first people may down side been now find any new work part take get "
    "place made live where after back little only round man year came show every good me give "
    "our under name very through just form "
).split()


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where prompts come from; lengths are in tokens."""

    dataset: Dataset
    path: Path | None
    input_len: int
    output_len: int
    vocab_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.dataset != "random" and self.path is None:
            raise ConfigError(f"--dataset={self.dataset} needs --dataset-path FILE.")
        if self.dataset == "random" and self.path is not None:
            raise ConfigError(
                f"--dataset-path={self.path} is not read with --dataset=random: choose sharegpt "
                "or prompts."
            )


def load_prompts(
    source: PromptSource, num_prompts: int, endpoint: Endpoint, *, salt: int
) -> list[Prompt]:
    """`num_prompts` prompts; another `salt` gives other random ones, which no cache has seen.

    A file that has fewer begins again: the server's prefix cache may know those then.
    """
    if source.path is not None:
        read = _sharegpt if source.dataset == "sharegpt" else _lines
        found = _read(source.path, read, source.dataset)
        first = salt * num_prompts
        contents: list[Any] = [found[(first + i) % len(found)] for i in range(num_prompts)]
    elif endpoint == "/v1/completions":
        contents = list(
            random_prompts(
                num_prompts,
                source.input_len,
                vocab_size=source.vocab_size,
                seed=_mixed(source.seed, salt),
            )
        )
    else:
        rng = random.Random(_mixed(source.seed, salt))
        contents = [" ".join(rng.choices(_WORDS, k=source.input_len)) for _ in range(num_prompts)]
    return [Prompt(content=content, output_len=source.output_len) for content in contents]


def _mixed(seed: int, salt: int) -> int:
    """A seed for each salt; the first is the seed itself, as in `bench throughput`."""
    return seed + 1_000_003 * salt


def _read(path: Path, read: Any, dataset: str) -> list[str]:
    try:
        prompts = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--dataset-path {path}: is no file for --dataset={dataset}: {error}."
        ) from error
    if not prompts:
        raise ConfigError(f"--dataset-path {path}: holds no prompts.")
    return prompts


def _sharegpt(text: str) -> list[str]:
    """The first human turn of each conversation: [{"conversations": [{"from", "value"}, ...]}]."""
    prompts = []
    for entry in json.loads(text):
        turns = entry.get("conversations") or entry.get("conversation") or []
        first = next((turn["value"] for turn in turns if turn["from"] in ("human", "user")), "")
        if first.strip():
            prompts.append(first)
    return prompts


def _lines(text: str) -> list[str]:
    """A prompt a line: plain text, or JSON objects with a "prompt"."""
    lines = [line for line in text.splitlines() if line.strip()]
    if all(line.lstrip().startswith("{") for line in lines):
        return [str(json.loads(line)["prompt"]) for line in lines]
    return lines
