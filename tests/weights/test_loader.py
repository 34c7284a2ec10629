"""Loading into shards: values, dtypes, one error for all that is wrong, bounded host memory."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxinfer.errors import CheckpointError
from jaxinfer.layers.packing import Packing
from jaxinfer.models.pieces import Piece
from jaxinfer.weights.loader import PHASE, load_params
from jaxinfer.weights.reader import CheckpointReader, open_checkpoint
from pallas_kernels.matmul.cpu import PanelMatmul
from tests.weights.checkpoints import write_gguf, write_shards


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mesh_of(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]), ("tensor",))


def target(shape, dtype, mesh: Mesh, *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def whole(name: str, *shape: int) -> tuple[Piece, ...]:
    return (Piece(name=name, shape=shape, arrange=lambda array: array),)


def load(reader: CheckpointReader, abstract, pieces, **options):
    arguments = {
        "packings": {},
        "optional_names": lambda name: False,
        "on_progress": lambda *_: None,
    }
    return load_params(reader, abstract, pieces, **(arguments | options))


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return {"q": random(8, 6, seed=1), "k": random(4, 6, seed=2), "norm": random(6, seed=3)}


@pytest.fixture
def reader(tmp_path: Path, tensors) -> CheckpointReader:
    return open_checkpoint(write_shards(tmp_path, {"model.safetensors": tensors}, index=False))


MERGED = {
    # two tensors, transposed, into one parameter whose last rows are padding
    "qk": (
        Piece(name="q", shape=(8, 6), arrange=np.transpose, region=(slice(None), slice(8))),
        Piece(name="k", shape=(4, 6), arrange=np.transpose, region=(slice(None), slice(8, 12))),
    ),
    "norm": whole("norm", 6),
}


@pytest.mark.parametrize("num_devices", [1, 4, 8])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_pieces_fill_their_regions_in_every_shard(reader, tensors, num_devices, dtype):
    mesh = mesh_of(num_devices)
    abstract = {
        "qk": target((6, 16), dtype, mesh, None, "tensor"),
        "norm": target((6,), dtype, mesh),
    }
    params = load(reader, abstract, MERGED)
    expected = np.zeros((6, 16), dtype)
    expected[:, :8] = tensors["q"].T.astype(dtype)
    expected[:, 8:12] = tensors["k"].T.astype(dtype)
    assert list(params) == list(abstract)
    assert params["qk"].dtype == dtype
    assert params["qk"].sharding == abstract["qk"].sharding
    np.testing.assert_array_equal(np.asarray(params["qk"]), expected)
    np.testing.assert_array_equal(np.asarray(params["norm"]), tensors["norm"].astype(dtype))
    shards = params["qk"].addressable_shards
    assert len(shards) == num_devices
    for shard in shards:
        assert shard.data.shape == (6, 16 // num_devices)
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])


def test_integer_indices_and_a_tensor_that_serves_two_parameters(reader, tensors):
    mesh = mesh_of(2)
    pieces = {
        "heads": tuple(
            Piece(
                name="q",
                shape=(8, 6),
                arrange=lambda array, head=head: array[2 * head : 2 * head + 2],
                region=(head, slice(None)),
            )
            for head in range(4)
        ),
        "again": whole("q", 8, 6),
        "k": whole("k", 4, 6),
        "norm": whole("norm", 6),
    }
    abstract = {
        "heads": target((4, 2, 6), np.float32, mesh, "tensor"),
        "again": target((8, 6), np.float32, mesh),
        "k": target((4, 6), np.float32, mesh),
        "norm": target((6,), np.float32, mesh),
    }
    params = load(reader, abstract, pieces)
    np.testing.assert_array_equal(np.asarray(params["heads"]), tensors["q"].reshape(4, 2, 6))
    np.testing.assert_array_equal(np.asarray(params["again"]), tensors["q"])


def test_all_that_is_wrong_is_one_sorted_error(reader):
    mesh = mesh_of(1)
    abstract = {
        name: target((6,), np.float32, mesh) for name in ("norm", "bias", "nowhere", "lost")
    }
    pieces = {"norm": whole("norm", 7), "bias": whole("b", 6), "lost": whole("l", 6)}
    with pytest.raises(CheckpointError) as caught:
        load(reader, abstract, pieces, optional_names=lambda name: name == "q")
    lines = str(caught.value).splitlines()
    assert "(5 problems)" in lines[0] and str(reader.path) in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "left over: tensor k",
        "missing: tensor b (for bias)",
        "missing: tensor l (for lost)",
        "parameter nowhere is not mapped to any tensor",
        "wrong shape: tensor norm is (6,), the model needs (7,)",
    ]


def test_a_long_list_of_problems_is_capped_with_its_count(tmp_path):
    tensors = {f"extra.{i:03}": random(2) for i in range(70)}
    reader = open_checkpoint(write_shards(tmp_path, {"model.safetensors": tensors}, index=False))
    with pytest.raises(CheckpointError) as caught:
        load(reader, {}, {})
    lines = str(caught.value).splitlines()
    assert "(70 problems)" in lines[0] and len(lines) == 22
    assert lines[-1].strip() == "... and 50 more"
    assert load(reader, {}, {}, optional_names=lambda name: name.startswith("extra.")) == {}


def test_nothing_is_read_before_everything_fits(reader):
    reader.close()  # a read would now fail with another error
    with pytest.raises(CheckpointError, match="left over"):
        load(reader, {"norm": target((6,), np.float32, mesh_of(1))}, {"norm": whole("norm", 6)})


def test_values_beyond_float16_are_refused(tmp_path):
    tensors = {"w": np.array([1.0, 7e4], np.float32)}
    reader = open_checkpoint(write_shards(tmp_path, {"model.safetensors": tensors}, index=False))
    mesh = mesh_of(1)
    with pytest.raises(CheckpointError, match="float16's range; use --dtype bfloat16"):
        load(reader, {"w": target((2,), np.float16, mesh)}, {"w": whole("w", 2)})
    params = load(reader, {"w": target((2,), ml_dtypes.bfloat16, mesh)}, {"w": whole("w", 2)})
    assert np.isfinite(np.asarray(params["w"])).all()


def test_progress_counts_parameters_up_to_all(reader):
    mesh = mesh_of(1)
    seen = []
    abstract = {"qk": target((6, 16), np.float32, mesh), "norm": target((6,), np.float32, mesh)}
    load(reader, abstract, MERGED, on_progress=lambda *event: seen.append(event))
    assert seen == [(PHASE, 0, 2), (PHASE, 1, 2), (PHASE, 2, 2)]


@pytest.mark.parametrize("file_format", ["safetensors", "gguf"])
def test_peak_host_memory_is_one_parameter_not_the_model(tmp_path, file_format):
    """numpy's memory is traced, the files' maps are not. Sharding makes the devices copy."""
    num_layers, shape = 24, (1024, 512)
    tensors = {f"blk.{i}.ffn_up.weight": random(*shape, seed=i) for i in range(num_layers)}
    if file_format == "gguf":
        reader = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
        reader = open_checkpoint(tmp_path)
    mesh = mesh_of(4)
    pieces = {name: whole(name, *shape) for name in reader.tensors()}
    abstract = {
        name: target(shape, ml_dtypes.bfloat16, mesh, None, "tensor") for name in reader.tensors()
    }
    tracemalloc.start()
    try:
        params = load(reader, abstract, pieces)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = 1024 * 512 * (2 + 4)  # the bfloat16 parameter and the float32 tensor
    model = num_layers * 1024 * 512 * 2
    assert peak < 1.5 * largest < model / 4
    assert len(params) == num_layers


def test_a_failing_read_ends_the_load(tmp_path):
    """The first error comes out; the threads that wait for memory do not hang."""
    tensors = {f"t{i}": random(64, 64, seed=i) for i in range(12)}
    reader = open_checkpoint(write_shards(tmp_path, {"model.safetensors": tensors}, index=False))

    def refuse(array: np.ndarray) -> np.ndarray:
        raise CheckpointError("cannot be arranged")

    pieces = {name: whole(name, 64, 64) for name in tensors}
    pieces["t0"] = (Piece(name="t0", shape=(64, 64), arrange=refuse),)
    abstract = {name: target((64, 64), np.float32, mesh_of(1)) for name in tensors}
    with pytest.raises(CheckpointError, match="cannot be arranged"):
        load(reader, abstract, pieces)


def test_parameters_stay_when_reader_and_file_are_gone(tmp_path, tensors):
    directory = write_shards(tmp_path / "m", {"model.safetensors": tensors}, index=False)
    reader = open_checkpoint(directory)
    abstract = {name: target(a.shape, a.dtype, mesh_of(1)) for name, a in tensors.items()}
    params = load(reader, abstract, {name: whole(name, *a.shape) for name, a in tensors.items()})
    reader.close()
    (directory / "model.safetensors").write_bytes(b"")  # truncates in place: maps would crash
    for name, expected in tensors.items():
        np.testing.assert_array_equal(np.asarray(params[name]), expected)


@pytest.mark.parametrize("columns_first", [False, True])
def test_packed_parameters_are_assembled_first(tmp_path, columns_first):
    """Two tensors side by side, then stored as the kernel wants it."""
    left, right = random(4, 3, seed=1), random(4, 3, seed=2)
    tensors = {"left": left, "right": right}
    reader = open_checkpoint(write_shards(tmp_path, {"model.safetensors": tensors}, index=False))
    kernel = PanelMatmul(target="unused", panel=16, dtype="bfloat16")
    packing = Packing(kernel=kernel, shape=(4, 6), num_contracted=1, columns_first=columns_first)
    if columns_first:
        packing = replace(packing, shape=(6, 4))
    abstract = {"both": target(packing.stored.shape, packing.stored.dtype, mesh_of(1))}
    pieces = {
        "both": tuple(
            Piece(
                name=name,
                shape=(4, 3),
                arrange=np.transpose if columns_first else lambda array: array,
                region=(part,) if columns_first else (slice(None), part),
            )
            for name, part in (("left", slice(3)), ("right", slice(3, 6)))
        )
    }
    params = load(reader, abstract, pieces, packings={"both": packing})
    expected = kernel.pack(np.concatenate([left, right], axis=1))
    np.testing.assert_array_equal(params["both"], expected)
