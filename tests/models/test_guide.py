"""The family that docs/add-a-model.md adds, run as it stands there.

Phi-3's checkpoints are Mistral's with merged tensors, so a golden Mistral model says what is right.
"""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.models.registry import FAMILIES
from tests.models.harness import GOLDEN_DIR, REFERENCE_KERNELS, LoadedModel, Session, golden_of
from tests.tolerances import LOGITS_FLOAT32

GUIDE = Path(__file__).parents[2] / "docs" / "add-a-model.md"
SOURCE = "mistral_window"
MERGED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def add_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what the guide says: one module, one line in the registry."""
    module_code, registry_code = re.findall(
        r"^```python\n(.*?)^```", GUIDE.read_text(), re.S | re.M
    )
    architecture, place = re.findall(r'"(\w+)": "([\w.:]+)"', registry_code)[0]
    module = ModuleType(place.split(":")[0])
    exec(compile(module_code, GUIDE, "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FAMILIES, architecture, place)


def write_phi3(directory: Path) -> None:
    tensors = load_file(GOLDEN_DIR / SOURCE / "model.safetensors")
    for name in list(tensors):
        for merged, parts in MERGED.items():
            if parts[0] in name:
                rows = [tensors.pop(name.replace(parts[0], part)) for part in parts]
                tensors[name.replace(parts[0], merged)] = np.concatenate(rows)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((GOLDEN_DIR / SOURCE / "config.json").read_text())
    config |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    config |= {"original_max_position_embeddings": 128, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("tensor", [1, 4])
def test_the_guides_family_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: int):
    add_family(monkeypatch)
    write_phi3(tmp_path)
    model, golden = (
        LoadedModel(tmp_path, tensor=tensor, kernels=REFERENCE_KERNELS),
        golden_of(SOURCE),
    )
    assert golden.error(Session(model).feed({0: golden.prompt})[0]) <= LOGITS_FLOAT32
