"""Hugging Face directories: every dtype, shards, and each kind of damage with its message."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.errors import CheckpointError
from jaxinfer.weights.reader import open_checkpoint
from jaxinfer.weights.safetensors import SafetensorsReader
from tests.weights.checkpoints import CONFIG, write_shards

DTYPES = [
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int8,
    np.int64,
    np.bool_,
]


def tensor(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_every_dtype_reads_back_bit_for_bit(tmp_path, dtype):
    # An odd name length moves the data to an odd offset: views must not need alignment.
    tensors = {"odd": tensor(3, dtype=np.int8), "weight": tensor(3, 4, dtype=dtype)}
    write_shards(tmp_path, {"model.safetensors": tensors}, index=False)
    reader = open_checkpoint(tmp_path)
    info = reader.tensors()["weight"]
    assert (info.shape, info.dtype, info.num_bytes) == (
        (3, 4),
        np.dtype(dtype),
        12 * np.dtype(dtype).itemsize,
    )
    read = reader.read("weight")
    assert read.dtype == dtype and read.tobytes() == tensors["weight"].tobytes()
    assert not read.flags.writeable


def test_scalars_and_empty_tensors(tmp_path):
    tensors = {"scalar": np.full((), 3.0, np.float32), "empty": np.zeros((0, 4), np.float32)}
    reader = SafetensorsReader(write_shards(tmp_path, {"model.safetensors": tensors}, index=False))
    assert reader.read("scalar") == 3.0
    assert reader.read("empty").shape == (0, 4)


def test_shards_are_one_checkpoint_and_arrays_outlive_the_reader(tmp_path):
    shards = {
        "model-00001-of-00002.safetensors": {"a": tensor(2, 3)},
        "model-00002-of-00002.safetensors": {"b": tensor(4), "c": tensor(1, 1)},
    }
    reader = open_checkpoint(write_shards(tmp_path, shards))
    assert set(reader.tensors()) == {"a", "b", "c"}
    array = reader.read("b")
    reader.close()
    np.testing.assert_array_equal(array, tensor(4))
    assert reader.config() == CONFIG
    assert reader.generation_config() == {}


def test_shards_without_an_index_and_a_consolidated_copy(tmp_path):
    shards = {"x1.safetensors": {"a": tensor(2)}, "x2.safetensors": {"b": tensor(2)}}
    write_shards(tmp_path, shards | {"consolidated.safetensors": {"wq": tensor(2)}}, index=False)
    assert set(open_checkpoint(tmp_path).tensors()) == {"a", "b"}


def failure(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_missing_shards_are_named(tmp_path):
    shards = {f"model-{i}-of-3.safetensors": {f"t{i}": tensor(2)} for i in (1, 2, 3)}
    write_shards(tmp_path, shards)
    (tmp_path / "model-1-of-3.safetensors").unlink()
    (tmp_path / "model-3-of-3.safetensors").unlink()
    message = failure(tmp_path)
    assert "lacks 2 of 3 shards" in message
    assert "model-1-of-3" in message and "model-3-of-3" in message
    assert "model-2-of-3" not in message


@pytest.mark.parametrize("num_bytes", [0, 5, 9, 40, -1])
def test_a_truncated_file_is_named_with_its_size(tmp_path, num_bytes):
    write_shards(tmp_path, {"model.safetensors": {"a": tensor(100)}}, index=False)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:num_bytes])
    message = failure(tmp_path)
    assert "cut short" in message and str(file) in message
    assert str(len(whole[:num_bytes])) in message
    if num_bytes == -1:
        assert str(len(whole)) in message  # what it should be


def test_other_damage_is_a_checkpoint_error(tmp_path):
    write_shards(tmp_path, {"model.safetensors": {"a": tensor(100)}}, index=False)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:8] + b"x" + whole[9:])
    assert "no valid safetensors header" in failure(tmp_path)
    file.write_bytes(whole + b"more")
    assert "not a valid safetensors file" in failure(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in failure(tmp_path)


def test_an_index_that_names_tensors_that_are_not_there(tmp_path):
    write_shards(tmp_path, {"m.safetensors": {"a": tensor(2), "lost": tensor(2)}})
    save_file({"a": tensor(2)}, tmp_path / "m.safetensors")
    message = failure(tmp_path)
    assert "lost (m.safetensors)" in message and "names 1 tensors" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_broken_index(tmp_path, text):
    write_shards(tmp_path, {"m.safetensors": {"a": tensor(2)}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in failure(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    write_shards(
        tmp_path,
        {"a.safetensors": {"w": tensor(2)}, "b.safetensors": {"w": tensor(2)}},
        index=False,
    )
    message = failure(tmp_path)
    assert "a.safetensors" in message and "b.safetensors" in message


def test_directories_that_hold_no_weights(tmp_path):
    assert "no *.safetensors" in failure(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "PyTorch pickles" in failure(tmp_path)
    assert "does not exist" in failure(tmp_path / "nowhere")


def test_config_json_missing_or_malformed(tmp_path):
    write_shards(tmp_path, {"model.safetensors": {"a": tensor(2)}}, index=False)
    reader = open_checkpoint(tmp_path)
    for text in ("{", "[1]", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match="config.json"):
            reader.config()
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        reader.config()


def test_load_format_is_checked_and_dummy_needs_no_weights(tmp_path):
    write_shards(tmp_path, {"model.safetensors": {"a": tensor(2)}}, index=False)
    with pytest.raises(CheckpointError, match="load_format is 'gguf'"):
        open_checkpoint(tmp_path, "gguf")
    (tmp_path / "model.safetensors").unlink()
    reader = open_checkpoint(tmp_path, "dummy")
    assert reader.config() == CONFIG and reader.tensors() == {}
