"""Puts a checkpoint's tensors straight into the shards of the parameters on their devices.

Knows pieces (what makes up a parameter), packings (how some are stored), readers and shardings.
Knows no model and no format.
Host memory stays at what the costliest single parameter needs: parameters are assembled side by
side only as far as they fit into that together.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager

import jax
import numpy as np

from jaxinfer.core.progress import ProgressCallback
from jaxinfer.errors import CheckpointError
from jaxinfer.layers.packing import Packing
from jaxinfer.models.pieces import ParamPieces, Piece
from jaxinfer.weights.reader import CheckpointReader, TensorInfo

PHASE = "load weights"

_MAX_LISTED = 20  # problems in one message
_NUM_THREADS = 4  # reading and dequantizing overlap with copies to the devices
_ALIGNMENT = 64  # bytes; XLA's CPU backend uses such a buffer as it is, without a copy


def load_params(
    reader: CheckpointReader,
    abstract: dict[str, jax.ShapeDtypeStruct],
    pieces: ParamPieces,
    *,
    packings: Mapping[str, Packing],
    optional_names: Callable[[str], bool],
    on_progress: ProgressCallback,
) -> dict[str, jax.Array]:
    """Load every parameter of `abstract`, each with its `.sharding`, in its dtype.

    Those in `packings` are assembled in their own shape and then packed.
    `optional_names` says of a left-over checkpoint tensor whether it may be ignored.
    `on_progress(phase, parameters done, parameters)` is called in this thread.
    Raises CheckpointError that lists everything that does not fit, before anything is read.
    """
    infos = reader.tensors()
    check_fit(reader, abstract, pieces, optional_names=optional_names)
    plain = {path: packing.plain for path, packing in packings.items()}
    costs = {
        path: _host_bytes(plain.get(path, abstract[path]), pieces[path], infos) for path in abstract
    }
    budget = _ByteBudget(max(costs.values(), default=0))

    def load(path: str) -> jax.Array:
        with budget.hold(costs[path]):
            host = _assemble(reader, path, plain.get(path, abstract[path]), pieces[path])
            if path in packings:
                host = packings[path].pack(host)
            return _to_devices(host, abstract[path], path)

    done: dict[str, jax.Array] = {}
    on_progress(PHASE, 0, len(abstract))
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="load-weights") as pool:
        futures = {pool.submit(load, path): path for path in abstract}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                on_progress(PHASE, len(done), len(abstract))
        finally:
            _cancel(futures)
    return {path: done[path] for path in abstract}


def check_fit(
    reader: CheckpointReader,
    abstract: dict[str, jax.ShapeDtypeStruct],
    pieces: ParamPieces,
    *,
    optional_names: Callable[[str], bool],
) -> None:
    """Raise one CheckpointError for all missing, misshapen and left-over tensors."""
    infos = reader.tensors()
    problems = [
        f"parameter {path} is not mapped to any tensor" for path in abstract.keys() - pieces
    ]
    used: set[str] = set()
    for path in abstract.keys() & pieces:
        for piece in pieces[path]:
            used.add(piece.name)
            problem = _describe_misfit(path, piece, infos.get(piece.name))
            if problem:
                problems.append(problem)
    problems += [f"left over: tensor {n}" for n in infos.keys() - used if not optional_names(n)]
    if not problems:
        return
    problems = sorted(set(problems))
    lines = problems[:_MAX_LISTED]
    if len(problems) > _MAX_LISTED:
        lines.append(f"... and {len(problems) - _MAX_LISTED} more")
    raise CheckpointError(
        f"the weights in {reader.path} do not fit the model that its configuration describes"
        f" ({len(problems)} problems); check config.json, or download the model again:\n  "
        + "\n  ".join(lines)
    )


def _describe_misfit(path: str, piece: Piece, info: TensorInfo | None) -> str | None:
    if info is None:
        return f"missing: tensor {piece.name} (for {path})"
    if info.shape != piece.shape:
        return f"wrong shape: tensor {piece.name} is {info.shape}, the model needs {piece.shape}"
    return None


def _host_bytes(
    target: jax.ShapeDtypeStruct, parts: tuple[Piece, ...], infos: dict[str, TensorInfo]
) -> int:
    """Host memory in use while a parameter is assembled: itself and one tensor, read and cast."""
    itemsize = np.dtype(target.dtype).itemsize
    own = math.prod(target.shape) * itemsize
    casts = (math.prod(infos[p.name].shape) * itemsize for p in parts)
    return own + max((infos[p.name].num_bytes for p in parts), default=0) + max(casts, default=0)


def _assemble(
    reader: CheckpointReader, path: str, target: jax.ShapeDtypeStruct, parts: tuple[Piece, ...]
) -> np.ndarray:
    host = _aligned_zeros(target.shape, np.dtype(target.dtype))
    for name in dict.fromkeys(piece.name for piece in parts):
        # One read for all pieces of a tensor: reading may mean dequantizing.
        _fill(host, reader.read(name), tuple(piece for piece in parts if piece.name == name))
    if host.dtype == np.float16 and np.isinf(host).any():
        raise CheckpointError(
            f"{path} of {reader.path} holds values beyond float16's range; use --dtype bfloat16"
        )
    return host


def _to_devices(host: np.ndarray, target: jax.ShapeDtypeStruct, path: str) -> jax.Array:
    assert target.sharding is not None, f"{path} has no sharding"
    assert (host.shape, host.dtype) == (target.shape, target.dtype), path
    array = jax.make_array_from_callback(target.shape, target.sharding, lambda index: host[index])
    # The copies to the devices read `host`: it counts against the budget until they are done.
    return array.block_until_ready()


def _fill(host: np.ndarray, tensor: np.ndarray, parts: tuple[Piece, ...]) -> None:
    """Copy one tensor's pieces, rearranged and cast, into their regions of the parameter."""
    with np.errstate(over="ignore"):  # float16 overflow is reported by the caller
        if not all(piece.arrange(tensor).flags.c_contiguous for piece in parts):
            # numpy casts and transposes in one go eight times slower than one after the other.
            tensor = tensor.astype(host.dtype, copy=False)
        for piece in parts:
            arranged = piece.arrange(tensor)
            region = host[piece.region] if piece.region else host
            assert arranged.shape == region.shape, (
                f"{piece.name} arranged to {arranged.shape} for a region of {region.shape}"
            )
            np.copyto(region, arranged, casting="unsafe")


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _cancel(futures: dict[Future[jax.Array], str]) -> None:
    for future in futures:
        future.cancel()


class _ByteBudget:
    """Lets holders in while their bytes fit together; the largest one fits alone."""

    def __init__(self, num_bytes: int) -> None:
        self._free = num_bytes
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: num_bytes <= self._free)
            self._free -= num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free += num_bytes
                self._changed.notify_all()
