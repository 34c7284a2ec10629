#!/usr/bin/env python3
"""Compares the engine with transformers on the default model: tokens, perplexity, devices.

    .venv/bin/python scripts/check_quality.py [--only tokens|perplexity|devices]

Needs torch (2.13.0) beside the installed package. The model is the catalogue's GGUF file; the same
weights are written as a Hugging Face directory, which is what transformers reads, so that both
ways into the engine are checked against one oracle:

  tokens      20 chat prompts, 64 greedy tokens each, equal; where they part, the two tokens must
              be a near tie (logits less than 1e-3 apart), and are listed
  perplexity  8,192 tokens of English documentation (Python's own topics) in windows of 1,024:
              float32 within 0.1 % of transformers, bfloat16 within 0.5 %, and so what is served
              if nothing is asked for (auto: float32 products with bfloat16 weights of the GGUF)
  devices     two and four (virtual) devices give the tokens of one

Prints a table; the exit code is 1 when a bound is missed. Takes minutes on a small machine.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

# Before JAX is imported: four devices to share the model among.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxinfer import LLM, SamplingParams
from jaxinfer.config.schema import ModelConfig
from jaxinfer.tokenizer.tokenizer import load_tokenizer
from jaxinfer.weights.hub import locate_model
from jaxinfer.weights.reader import open_checkpoint

NEAR_TIE = 1e-3
NUM_TOKENS = 64
WINDOW = 1024
NUM_WINDOWS = 8
PERPLEXITY_BOUND = {"float32": 0.001, "auto": 0.005, "bfloat16": 0.005}

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "What is 17 times 23?",
    "Name three uses of copper.",
    "Who wrote Pride and Prejudice?",
    "Translate 'good morning' to Spanish.",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Summarize the plot of Hamlet in two sentences.",
    "What does HTTP stand for?",
    "Write a Python function that reverses a string.",
    "List the planets of the solar system.",
    "How do vaccines work?",
    "What is the difference between a virus and a bacterium?",
    "Suggest a name for a black cat.",
    "When did the Second World War end?",
    "What is the boiling point of water in Fahrenheit?",
    "Describe the taste of a lemon.",
    "Tell me a short story about a robot who learns to paint.",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report."""

    check: str
    result: str
    bound: str
    ok: bool

    def __str__(self) -> str:
        state = "ok  " if self.ok else "FAIL"
        return f"{state}  {self.check:<36}  {self.result}  ({self.bound})"


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is asked of every engine."""

    prompts: list[list[int]]
    windows: list[list[int]]


class Oracle:
    """transformers in float32 on one thread."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def greedy(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS
        )
        return out[0, len(prompt) :].tolist()

    def logits(self, token_ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return self._model(torch.tensor([token_ids])).logits[0].numpy()

    def perplexity(self, windows: list[list[int]]) -> float:
        total, count = 0.0, 0
        for window in windows:
            logits_TV = torch.from_numpy(self.logits(window)[:-1])
            log_probs_TV = torch.log_softmax(logits_TV.double(), dim=-1)
            total -= float(log_probs_TV.gather(1, torch.tensor(window[1:])[:, None]).sum())
            count += len(window) - 1
        return math.exp(total / count)


def write_directory(gguf: Path, directory: Path) -> Path:
    """The GGUF file's weights, dequantized to float32, as a Hugging Face directory."""
    reader = open_checkpoint(gguf)
    try:
        config = reader.config() | {"torch_dtype": "float32"}
        tensors = {name: reader.read(name).astype(np.float32) for name in reader.tensors()}
    finally:
        reader.close()
    directory.mkdir(parents=True, exist_ok=True)
    load_tokenizer(gguf).save_json(directory)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_material(directory: Path) -> Material:
    """Prompts and text, tokenized by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text[: 8 * WINDOW * NUM_WINDOWS])["input_ids"]
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(NUM_WINDOWS)]
    assert all(len(window) == WINDOW for window in windows), "the text is too short"
    return Material(prompts=prompts, windows=windows)


@contextmanager
def engine(model: Path, *, dtype: str = "float32", devices: int = 1) -> Iterator[LLM]:
    """A small engine: few shapes to compile."""
    with LLM(
        str(model),
        dtype=dtype,
        tensor_parallel_size=devices,
        max_model_len=WINDOW,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        token_buckets=[256],
    ) as llm:
        yield llm


def greedy_tokens(llm: LLM, prompts: Sequence[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [out.outputs[0].token_ids for out in llm.generate(inputs, params, use_tqdm=False)]


def perplexity(llm: LLM, windows: list[list[int]]) -> float:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    inputs: list[Any] = [{"prompt_token_ids": window} for window in windows]
    total, count = 0.0, 0
    for window, output in zip(windows, llm.generate(inputs, params, use_tqdm=False), strict=True):
        assert output.prompt_logprobs is not None
        for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            total -= entry[token].logprob
            count += 1
    return math.exp(total / count)


def compare_tokens(
    name: str, got: list[list[int]], wanted: list[list[int]], material: Material, oracle: Oracle
) -> Row:
    """Equal, or apart at a near tie of the oracle's logits."""
    num_equal, near_ties, faults = 0, [], []
    for index, (own, reference) in enumerate(zip(got, wanted, strict=True)):
        if own == reference:
            num_equal += 1
            continue
        pairs = enumerate(zip(own, reference, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(own), len(reference)))
        if at == len(own) or at == len(reference):
            faults.append(f"prompt {index}: one ends at token {at}")
            continue
        logits_V = oracle.logits(material.prompts[index] + reference[:at])[-1]
        gap = float(logits_V[reference[at]] - logits_V[own[at]])
        text = f"prompt {index} token {at}: {reference[at]} or {own[at]}, {gap:.1e} apart"
        (near_ties if abs(gap) < NEAR_TIE else faults).append(text)
    for text in near_ties:
        print(f"  near tie, {name}: {text}")
    for text in faults:
        print(f"  WRONG, {name}: {text}")
    return Row(
        check=name,
        result=f"{num_equal}/{len(wanted)} equal, {len(near_ties)} near ties",
        bound=f"equal, or < {NEAR_TIE:g} apart",
        ok=not faults,
    )


def check_models(
    paths: dict[str, Path], material: Material, oracle: Oracle, only: str | None
) -> Iterator[Row]:
    """Tokens and perplexity of both formats and dtypes."""
    wanted = [oracle.greedy(prompt) for prompt in material.prompts] if only != "perplexity" else []
    reference = oracle.perplexity(material.windows) if only != "tokens" else math.nan
    for dtype, bound in PERPLEXITY_BOUND.items():
        for name, path in paths.items():
            if dtype != "float32" and only == "tokens":
                continue
            with engine(path, dtype=dtype) as llm:
                if dtype == "float32" and only != "perplexity":
                    tokens = greedy_tokens(llm, material.prompts)
                    check = f"tokens, {name}, {dtype}"
                    yield compare_tokens(check, tokens, wanted, material, oracle)
                if only == "tokens":
                    continue
                value = perplexity(llm, material.windows)
            change = value / reference - 1
            yield Row(
                check=f"perplexity, {name}, {dtype}",
                result=f"{value:.4f} against {reference:.4f}: {change:+.4%}",
                bound=f"within {bound:.1%}",
                ok=abs(change) <= bound,
            )


def check_devices(path: Path, material: Material, oracle: Oracle) -> Iterator[Row]:
    """More devices, same tokens."""
    prompts = material.prompts[:4]
    wanted = [oracle.greedy(prompt) for prompt in prompts]
    for devices in (2, 4):
        with engine(path, devices=devices) as llm:
            tokens = greedy_tokens(llm, prompts)
        yield compare_tokens(f"tokens, {devices} devices", tokens, wanted, material, oracle)


def run_checks(directory: Path, gguf: Path, only: str | None) -> Iterator[Row]:
    material, oracle = make_material(directory), Oracle(directory)
    if only != "devices":
        yield from check_models({"HF directory": directory, "GGUF": gguf}, material, oracle, only)
    if only in (None, "devices"):
        yield from check_devices(gguf, material, oracle)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("tokens", "perplexity", "devices"))
    only = parser.parse_args().only
    gguf = locate_model(ModelConfig(), lambda *_: None).path
    all_ok = True
    with tempfile.TemporaryDirectory() as temporary:
        directory = write_directory(gguf, Path(temporary) / "model")
        for row in run_checks(directory, gguf, only):
            print(row, flush=True)
            all_ok &= row.ok
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())
