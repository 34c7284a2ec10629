"""The GGUF header: all that the gguf package writes, and files that are damaged or cut anywhere."""

import random
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxinfer.core.gguf_header import read_gguf_header
from jaxinfer.errors import CheckpointError
from tests.weights.checkpoints import write_gguf

PLAIN = {
    "general.alignment": 64,
    "text": "grüß 日本\n",
    "words": ["a", "", "日本"],
    "flag": True,
    "flags": [True, False],
    "numbers": [1, -2, 3],
    "floats": [1e-5, 0.1, -3.0],
    "nested": [[1, 2], [3]],
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    tensors = {"one": np.arange(5, dtype=np.float32), "two": np.ones((3, 4), np.float16)}
    return write_gguf(tmp_path / "small.gguf", tensors, plain=PLAIN)


def header_bytes(path: Path) -> int:
    """Where the last tensor's record ends."""
    whole = path.read_bytes()
    # name, number of dimensions, two dimensions, type, offset
    return whole.index(b"two" + (2).to_bytes(4, "little")) + 3 + 4 + 16 + 4 + 8


def test_header_is_that_of_the_gguf_package(small: Path):
    ours, theirs = read_gguf_header(small), gguf.GGUFReader(small)
    assert ours.file_bytes == small.stat().st_size
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    fields["nested"] = PLAIN["nested"]  # which that package's reader flattens
    assert ours.metadata.keys() == fields.keys()
    for key, value in fields.items():
        is_float = isinstance(value, float) or key == "floats"
        assert ours.metadata[key] == (pytest.approx(value) if is_float else value), key
    assert [tuple(record) for record in ours.tensors] == [
        (t.name, t.tensor_type, tuple(reversed(t.shape.tolist())), t.data_offset)
        for t in theirs.tensors
    ]


def test_floats_are_the_decimals_that_were_written(small: Path):
    metadata = read_gguf_header(small).metadata
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert metadata["floats"] == [1e-5, 0.1, -3.0]


def test_every_float32_survives(tmp_path: Path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    path = write_gguf(tmp_path / "floats.gguf", {}, plain={"floats": values.tolist()})
    read = read_gguf_header(path).metadata["floats"]
    assert np.array_equal(np.array(read, np.float32), values)
    normal = np.abs(values) >= np.finfo(np.float32).tiny
    shortest = [float(str(value)) for value in values[normal]]
    assert shortest == np.array(read)[normal].tolist()


def test_infinities_and_nan_are_read(tmp_path: Path):
    odd = [float("inf"), float("-inf"), float("nan")]
    path = write_gguf(tmp_path / "odd.gguf", {}, plain={"floats": odd})
    assert str(read_gguf_header(path).metadata["floats"]) == "[inf, -inf, nan]"


def test_a_header_cut_anywhere_names_file_and_sizes(small: Path, tmp_path: Path):
    whole = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(header_bytes(small)):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is cut short: it has") as caught:
            read_gguf_header(cut)
        assert str(cut) in str(caught.value)
        assert f"{length} bytes" in str(caught.value)
        assert "download it again" in str(caught.value)
    cut.write_bytes(whole[: header_bytes(small)])
    assert len(read_gguf_header(cut).tensors) == 2


def test_files_that_are_no_gguf(small: Path, tmp_path: Path):
    whole = small.read_bytes()
    first_pair = whole[:24]
    nested = struct.pack("<IQ", 9, 1) * 99
    cases = [
        (b"PK\3\4" + whole[4:], "not a GGUF file"),
        (whole[:4] + (9).to_bytes(4, "little") + whole[8:], "GGUF version 9"),
        (whole[:4] + (3).to_bytes(4, "big") + whole[8:], "big-endian"),
        (whole[:24] + b"\xff" * 8 + whole[32:], "cut short"),  # the length of the first key
        (whole[:8] + b"\xff" * 8 + whole[16:], "cut short"),  # the number of tensors
        (whole[:16] + b"\xff" * 8 + whole[24:], "cut short"),  # the number of values
        (first_pair + struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60), "cut short"),
        (first_pair + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**60), "cut short"),
        (first_pair + struct.pack("<Q1sI", 1, b"a", 99) + bytes(500), "type 99"),
        (first_pair + struct.pack("<Q1s", 1, b"\xff") + bytes(500), "not UTF-8"),
        (first_pair + struct.pack("<Q1sI", 1, b"a", 9) + nested, "nested too deeply"),
    ]
    wrong = tmp_path / "wrong.gguf"
    for content, message in cases:
        wrong.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_gguf_header(wrong)
        assert str(wrong) in str(caught.value)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_gguf_header(tmp_path / "nowhere.gguf")


def test_random_damage_is_an_error_or_harmless_and_never_slow(small: Path, tmp_path: Path):
    whole, rng = small.read_bytes(), random.Random(0)
    damaged = tmp_path / "damaged.gguf"
    start_s = time.process_time()
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(header_bytes(small))] = rng.randrange(256)
        damaged.write_bytes(content)
        try:
            read_gguf_header(damaged)
        except CheckpointError as error:
            assert str(damaged) in str(error)
    assert time.process_time() - start_s < 10


@pytest.mark.model
def test_the_real_file(smollm2_gguf: Path):
    start_s = time.process_time()
    header = read_gguf_header(smollm2_gguf)
    assert time.process_time() - start_s < 0.5  # 0.07 s where this was written
    assert len(header.metadata) == 33 and len(header.tensors) == 272
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(tokens) == 49152
