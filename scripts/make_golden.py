#!/usr/bin/env python
"""Writes tests/golden: tiny random models and what Hugging Face transformers computes with them.

    .venv/bin/pip install torch==2.13.0 transformers==5.23.0
    .venv/bin/python scripts/make_golden.py [NAME ...]

Made with those versions on a CPU. Each model is a Hugging Face directory with one more file,
golden.npz: `prompt` [T] token ids, `logits` [T, V] in float32, `greedy` [G] token ids that follow
the prompt, and `bfloat16_error`, of transformers' own logits in bfloat16. Weights are spread
widely, so that logits differ and no greedy token is near a tie. Knows transformers only: nothing
of jaxinfer may take part in what jaxinfer is tested against.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

GOLDEN_DIR = Path(__file__).parent.parent / "tests" / "golden"
NUM_PROMPT, NUM_GREEDY = 72, 24
SMALLEST_GAP = 0.005
"""Of the two best logits of a greedy token, in units of the largest logit: above any rounding."""
FEWEST_DISTINCT = 12
"""Among the greedy tokens: a model that repeats itself proves little."""


class GoldenModel(NamedTuple):
    """A config.json, and how the weights are kept."""

    model_type: str
    config: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"


COMMON = {
    "vocab_size": 101,  # a prime, and a hidden width that 4 does not divide: both need padding
    "hidden_size": 32,
    "intermediate_size": 54,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
THETA = {"rope_type": "default", "rope_theta": 10000.0}

MODELS: Mapping[str, GoldenModel] = {
    "llama_mha": GoldenModel("llama", {"num_key_value_heads": 4, "rope_parameters": THETA}),
    "llama_9_3_tied": GoldenModel(  # the heads of SmolLM2-135M
        "llama",
        {
            "hidden_size": 54,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "llama_mqa": GoldenModel("llama", {"num_key_value_heads": 1, "vocab_size": 96}),
    "llama_biases": GoldenModel("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_rope_llama3": GoldenModel(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama_rope_linear": GoldenModel(
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "mistral_window": GoldenModel("mistral", {"sliding_window": 16, "head_dim": 32}),
    "mistral_bfloat16": GoldenModel(
        "mistral", {"sliding_window": None, "head_dim": 16}, dtype=torch.bfloat16
    ),
    "qwen2": GoldenModel("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False}),
    "qwen2_rope_yarn": GoldenModel(
        "qwen2",
        {
            "max_position_embeddings": 96,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "qwen2_mixed_windows": GoldenModel(
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
        },
    ),
    "qwen3": GoldenModel(
        "qwen3", {"head_dim": 32, "use_sliding_window": False}, max_shard_size="60KB"
    ),
    "granite": GoldenModel(
        "granite",
        {
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": GoldenModel(
        "smollm3",
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    ),
}


def build_model(golden: GoldenModel, seed: int) -> PreTrainedModel:
    """A model of seeded random weights, rounded to the dtype they are kept in."""
    config = CONFIG_MAPPING[golden.model_type](**{**COMMON, **golden.config})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            value = 1 + 0.3 * noise if "norm" in name else 0.3 * noise
            param.copy_(value.to(golden.dtype))
    return model


def run_greedy(model: PreTrainedModel, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(logits of the prompt [T, V], greedy tokens), without a cache; None near a tie."""
    ids = prompt.tolist()
    with torch.no_grad():
        for _ in range(NUM_GREEDY):
            logits_TV = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
            second, best = np.sort(logits_TV[-1])[-2:]
            if best - second < SMALLEST_GAP * np.abs(logits_TV).max():
                return None
            ids.append(int(logits_TV[-1].argmax()))
    greedy = ids[len(prompt) :]
    if len(set(greedy)) < FEWEST_DISTINCT:
        return None
    return logits_TV[: len(prompt)], np.array(greedy, np.int32)


def measure_bfloat16(directory: Path, prompt: np.ndarray, logits_TV: np.ndarray) -> np.float32:
    """Root mean square of what bfloat16 changes in the logits, relative to the largest logit."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.no_grad():
        found_TV = model(torch.tensor([prompt.tolist()])).logits[0].float().numpy()
    return np.float32(np.sqrt(np.mean((found_TV - logits_TV) ** 2)) / np.abs(logits_TV).max())


def write_golden(name: str, golden: GoldenModel) -> None:
    """Tries seeds until no greedy token is near a tie."""
    vocab_size = golden.config.get("vocab_size", COMMON["vocab_size"])
    for seed in range(1000):
        prompt = np.random.default_rng(seed).integers(3, vocab_size, NUM_PROMPT, dtype=np.int32)
        model = build_model(golden, seed)
        result = run_greedy(model, prompt)
        if result is not None:
            break
    else:
        sys.exit(f"{name}: no seed without near ties")
    logits_TV, greedy = result
    directory = GOLDEN_DIR / name
    shutil.rmtree(directory, ignore_errors=True)
    model.to(golden.dtype).save_pretrained(directory, max_shard_size=golden.max_shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    error = measure_bfloat16(directory, prompt, logits_TV)
    arrays = {"prompt": prompt, "logits": logits_TV, "greedy": greedy, "bfloat16_error": error}
    np.savez_compressed(directory / "golden.npz", **arrays)
    if name == "llama_rope_llama3":
        write_version_4_config(directory)
    num_bytes = sum(file.stat().st_size for file in directory.iterdir())
    for file in directory.iterdir():
        file.chmod(0o644)
    print(f"{name}: seed {seed}, logits to {np.abs(logits_TV).max():.1f}, {num_bytes} bytes")


def write_version_4_config(directory: Path) -> None:
    """The same model as transformers 4 described it: other keys, the same numbers."""
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.51.0"
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / "config_version_4.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for name in names:
        write_golden(name, MODELS[name])


if __name__ == "__main__":
    main()
