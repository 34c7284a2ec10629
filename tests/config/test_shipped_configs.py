"""Every file under configs/serve and configs/batch can be used as it is."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxinfer.cli.main import main
from jaxinfer.weights.catalogue import load_catalogue

ROOT = Path(__file__).parents[2]
COMMANDS = {"serve": ["serve", "--config"], "batch": ["run"]}
FILES = sorted(path for kind in COMMANDS for path in (ROOT / "configs" / kind).rglob("*.yaml"))


def test_every_kind_is_there():
    names = {str(path.relative_to(ROOT / "configs")) for path in FILES}
    assert {
        "serve/cpu.yaml",
        "batch/chat.yaml",
        "batch/prompts.yaml",
        "batch/parquet.yaml",
    } <= names
    for part in ("gpu-80gb", "tpu-v5e-8", "tpu-v6e-8", "70b"):
        assert any(part in name for name in names), part


def check_shown(written: dict[str, Any], shown: dict[str, Any]) -> None:
    """Every name of a file, and its value as the program understood it."""
    for key, value in written.items():
        name = key.replace("-", "_")
        match value:
            case dict() if name == "sampling":
                assert shown[name] == value
            case dict():
                check_shown(value, shown[name])
            case str() if name == "path" and isinstance(shown[name], list):
                assert shown[name] == [value]
            case str() if re.fullmatch(r"\d+K", value):
                assert shown[name] == int(value[:-1]) * 1024
            case _:
                assert shown[name] == value, key


def test_a_server_drains():
    for path in FILES:
        if path.parent.name == "serve":
            assert yaml.safe_load(path.read_text())["shutdown-timeout"] >= 10, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_dry_run_takes_it(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    argv = [*COMMANDS[path.parent.name], str(path.relative_to(ROOT))]
    assert main([*argv, "--dry-run"]) == 0, capsys.readouterr().err
    shown = yaml.safe_load(capsys.readouterr().out)
    check_shown(yaml.safe_load(path.read_text()), shown)
    assert load_catalogue().find(shown["model"]) is not None
    assert f"jaxinfer {' '.join(argv)}" in path.read_text(), "its comment says how to use it"


def test_the_guide_lists_them():
    text = (ROOT / "configs" / "README.md").read_text()
    for path in FILES:
        assert f"`{path.relative_to(ROOT / 'configs')}`" in text
