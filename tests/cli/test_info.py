"""`jaxinfer info` tells the truth about this process's devices and caches."""

import json
from pathlib import Path

import jax
import pytest

from jaxinfer.cli.main import main


def test_json(empty_cache: Path, capsys: pytest.CaptureFixture[str]):
    (empty_cache / "models").mkdir(parents=True)
    (empty_cache / "models" / "file").write_bytes(b"12345")
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["devices"]["platform"] == "cpu"
    assert facts["devices"]["count"] == jax.local_device_count()
    assert facts["devices"]["memory_bytes"] > 0
    assert facts["cache"] == {
        "directory": str(empty_cache),
        "models_bytes": 5,
        "compiled_bytes": 0,
    }
    assert "quantization" in facts["not_supported_yet"]


def test_text_says_why_there_is_no_accelerator(
    empty_cache: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "jaxinfer[tpu]" in text or "libtpu" in text
    assert "platform" in text
    assert "None" not in text
