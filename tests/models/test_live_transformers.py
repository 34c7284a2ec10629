"""Where torch is installed: transformers itself, on the golden models and on fresh larger ones.

The golden files are thereby checked too: they are what this transformers computes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.harness import (
    GOLDEN_DIR,
    GOLDEN_NAMES,
    REFERENCE_KERNELS,
    Golden,
    LoadedModel,
    Session,
    golden_of,
)
from tests.tolerances import LOGITS_FLOAT32

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NUM_TOKENS = 80
SIZES = {
    "vocab_size": 263,
    "hidden_size": 120,
    "intermediate_size": 200,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "max_position_embeddings": 128,
}
FRESH: dict[str, dict[str, Any]] = {
    "llama": {
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 20,
        },
    },
    "mistral": {"sliding_window": 9, "head_dim": 16},
    "qwen2": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "mscale": 0.8,
            "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
    "qwen3": {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True},
    "granite": {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {"use_sliding_window": True, "sliding_window": 11, "no_rope_layer_interval": 2},
}


def transformers_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_files_are_what_transformers_computes(name: str):
    golden = golden_of(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN_DIR / name, dtype=torch.float32
    )
    assert golden.error(transformers_logits(model, golden.prompt)) <= LOGITS_FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FRESH)
def test_fresh_models(model_type: str, tmp_path: Path):
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | FRESH[model_type]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(tmp_path)
    token_ids = np.random.default_rng(0).integers(SIZES["vocab_size"], size=NUM_TOKENS).tolist()
    theirs = Golden(token_ids, transformers_logits(model, token_ids), [], 0.0)
    ours_TV = Session(LoadedModel(tmp_path, kernels=REFERENCE_KERNELS)).feed({0: token_ids})[0]
    assert theirs.error(ours_TV) <= LOGITS_FLOAT32
