"""The GGUF container: everything the gguf package writes, and files that are damaged."""

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
        plain={
            "general.alignment": 64,
            "text": "grüß",
            "words": ["a", "", "日本"],
            "flag": True,
            "numbers": [1, -2, 3],
            "floats": [1e-5, 0.1],
        },
    )


def test_metadata_and_tensors_are_those_of_the_gguf_package(small):
    ours, theirs = read_gguf(small), gguf.GGUFReader(small)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, value in fields.items():
        is_float = isinstance(value, float) or key == "floats"
        assert ours.metadata[key] == (pytest.approx(value) if is_float else value), key
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.kind, mine.offset) == (tensor.tensor_type, tensor.data_offset)
        assert ours.raw(mine).tobytes() == tensor.data.tobytes()


def test_floats_are_the_decimals_that_were_written(small):
    metadata = read_gguf(small).metadata
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert metadata["floats"] == [1e-5, 0.1]


def test_a_file_cut_anywhere_is_called_cut_short(small, tmp_path):
    whole = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    end_of_data = max(t.offset + t.num_bytes for t in read_gguf(small).tensors.values())
    for length in [*range(1, 200, 7), *range(200, end_of_data, 61), end_of_data - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut short") as caught:
            read_gguf(cut)
        assert str(cut) in str(caught.value) and str(length) in str(caught.value)


def test_data_that_is_cut_says_what_is_missing(small, tmp_path):
    whole = small.read_bytes()
    first_tensor = min(t.offset for t in read_gguf(small).tensors.values())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: first_tensor + 3])
    with pytest.raises(CheckpointError, match="2 of 2 tensors are incomplete"):
        read_gguf(cut)


def test_files_that_are_no_gguf(small, tmp_path):
    whole = small.read_bytes()
    wrong = tmp_path / "wrong.gguf"
    for content, message in [
        (b"", "cannot be read"),
        (b"PK\3\4" + whole[4:], "not a GGUF file"),
        (whole[:4] + (9).to_bytes(4, "little") + whole[8:], "GGUF version 9"),
        (whole[:4] + (3).to_bytes(4, "big") + whole[8:], "big-endian"),
        # the length of the first key: far beyond the file
        (whole[:24] + b"\xff" * 8 + whole[32:], "cut short"),
    ]:
        wrong.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_gguf(wrong)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(tmp_path / "nowhere.gguf")


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
    assert len(file.metadata) == 33 and len(file.tensors) == 272
    assert file.metadata["tokenizer.ggml.tokens"][:3] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert file.tensors["blk.0.attn_k.weight"].shape == (192, 576)
    last = max(t.offset + t.num_bytes for t in file.tensors.values())
    assert last == smollm2_gguf.stat().st_size
