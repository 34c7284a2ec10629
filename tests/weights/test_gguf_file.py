"""Tensors of a GGUF file, and files whose data is cut short (the header: tests/core)."""

import gguf
import numpy as np
import pytest

from jaxinfer.errors import CheckpointError
from jaxinfer.weights.gguf_file import read_gguf
from tests.weights.checkpoints import write_gguf


@pytest.fixture
def small(tmp_path):
    return write_gguf(
        tmp_path / "small.gguf",
        {"one": np.arange(5, dtype=np.float32), "two": np.ones((3, 4), np.float16)},
        plain={"general.alignment": 64},
    )


def test_tensors_are_those_of_the_gguf_package(small):
    ours, theirs = read_gguf(small), gguf.GGUFReader(small)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.kind, mine.offset) == (tensor.tensor_type, tensor.data_offset)
        assert ours.raw(mine).tobytes() == tensor.data.tobytes()


def test_a_file_cut_anywhere_is_called_cut_short(small, tmp_path):
    whole = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    end_of_data = max(t.offset + t.num_bytes for t in read_gguf(small).tensors.values())
    for length in [1, *range(200, end_of_data, 61), end_of_data - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut short") as caught:
            read_gguf(cut)
        assert str(cut) in str(caught.value) and str(length) in str(caught.value)


def test_a_tensor_that_is_there_twice(small, tmp_path):
    whole = small.read_bytes()
    twice = tmp_path / "twice.gguf"
    twice.write_bytes(whole.replace(b"two" + (2).to_bytes(4, "little"), b"one" + b"\2\0\0\0"))
    with pytest.raises(CheckpointError, match="tensor one twice"):
        read_gguf(twice)


def test_data_that_is_cut_says_what_is_missing(small, tmp_path):
    whole = small.read_bytes()
    first_tensor = min(t.offset for t in read_gguf(small).tensors.values())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: first_tensor + 3])
    with pytest.raises(CheckpointError, match="2 of 2 tensors are incomplete"):
        read_gguf(cut)


def test_an_unknown_tensor_type_is_named(small, tmp_path):
    whole = bytearray(small.read_bytes())
    # name "one": length, text, 1 dimension, size 5, then the type
    at = whole.index(b"one" + (1).to_bytes(4, "little")) + 3 + 4 + 8
    whole[at : at + 4] = (200).to_bytes(4, "little")
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(whole)
    with pytest.raises(CheckpointError, match="tensor one .* GGML type 200"):
        read_gguf(wrong)


@pytest.mark.model
def test_the_real_file_equals_the_gguf_package_on_a_sample(smollm2_gguf):
    file = read_gguf(smollm2_gguf)
    assert len(file.tensors) == 272
    assert file.tensors["blk.0.attn_k.weight"].shape == (192, 576)
    last = max(t.offset + t.num_bytes for t in file.tensors.values())
    assert last == smollm2_gguf.stat().st_size
