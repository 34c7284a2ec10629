"""Runs a checkpoint through the engine's path up to logits: reader, family, loader, step model.

What the runner adds (packing, sampling, buckets) is left out. A `Session` is a small paged cache
with a few sequences; `feed` runs one step over any mix of chunks and decodes.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.layers.batch_types import StepBatch
from jaxinfer.models.registry import define_model
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.parallel.rules import sharding_of
from jaxinfer.runner.abstract import make_abstract
from jaxinfer.runner.step_fn import StepModel
from jaxinfer.weights.loader import load_params
from jaxinfer.weights.reader import open_checkpoint
from pallas_kernels.dispatch import KernelSet, choose_kernels
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.api import StepLayout, locate_tokens
from tests.quick_jit import quick_jit

GOLDEN_DIR = Path(__file__).parent.parent / "golden"
GOLDEN_NAMES = sorted(path.name for path in GOLDEN_DIR.iterdir() if path.is_dir())

NUM_SEQS = 3
NUM_TOKENS = 80  # of the step that takes chunks
PAGE_SIZE = 8
PAGES_PER_SEQ = 13
NUM_PAGES = NUM_SEQS * PAGES_PER_SEQ + 1

ENGINE_KERNELS = choose_kernels(platform="cpu")
REFERENCE_KERNELS = KernelSet(
    plan_attention=reference.plan,
    paged_attention=reference.paged_attention,
    kv_storage_dtype=jnp.dtype,
    matmul=None,
    reasons=(),
)
"""For tests that are not about the op: it compiles in a third of the time."""


class Golden(NamedTuple):
    """What transformers computed (scripts/make_golden.py)."""

    prompt: list[int]
    logits: np.ndarray  # float32 [T, V]
    greedy: list[int]
    bfloat16_error: float  # of transformers' own logits in bfloat16: see `mean_error`

    def error(self, logits: np.ndarray, rows: slice = slice(None)) -> float:
        """Largest difference of these rows' logits, relative to the largest logit."""
        return float(np.abs(logits - self.logits[rows]).max() / np.abs(self.logits).max())

    def mean_error(self, logits: np.ndarray) -> float:
        """Root mean square of the difference, relative to the largest logit."""
        return float(np.sqrt(np.mean((logits - self.logits) ** 2)) / np.abs(self.logits).max())


def golden_of(name: str) -> Golden:
    with np.load(GOLDEN_DIR / name / "golden.npz") as stored:
        return Golden(
            prompt=stored["prompt"].tolist(),
            logits=stored["logits"],
            greedy=stored["greedy"].tolist(),
            bfloat16_error=float(stored["bfloat16_error"]),
        )


class LoadedModel:
    """A checkpoint on `tensor` devices."""

    def __init__(
        self,
        path: Path,
        *,
        tensor: int = 1,
        dtype: str = "float32",
        kernels: KernelSet = ENGINE_KERNELS,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        """`changes` are made to config.json: None removes a key."""
        self.dtype = dtype
        self.kernels = kernels
        self.mesh = make_mesh(tensor=tensor, devices=jax.devices())
        reader = open_checkpoint(path)
        merged = {**reader.config(), **(changes or {})}
        config = {key: value for key, value in merged.items() if value is not None}
        self.definition = define_model(config, tensor=tensor)
        abstract = make_abstract(self.definition, self.mesh, self.kernels, dtype=dtype)
        params = load_params(
            reader,
            abstract.params,
            self.definition.pieces,
            packings=abstract.packings,
            optional_names=self.definition.is_optional,
            on_progress=lambda *_: None,
        )
        self.weights = tuple(params[path] for path in abstract.params)
        self.step_model = StepModel(
            graphdef=abstract.graphdef,
            paths=abstract.paths,
            variables=abstract.variables,
            kernels=self.kernels,
            mesh=self.mesh,
            vocab_size=self.definition.shape.vocab_size,
            page_size=PAGE_SIZE,
            num_pages=NUM_PAGES,
        )

    @cached_property
    def chunk_step(self) -> jax.stages.Wrapped:
        return self._compile(decode_only=False)

    @cached_property
    def decode_step(self) -> jax.stages.Wrapped:
        return self._compile(decode_only=True)

    def _compile(self, *, decode_only: bool) -> jax.stages.Wrapped:
        def step(
            weights: tuple[Array, ...],
            pages_L: tuple[Array, ...],
            token_ids_T: Array,
            layout: StepLayout,
        ) -> tuple[Array, tuple[Array, ...]]:
            places = locate_tokens(
                layout,
                num_tokens=token_ids_T.shape[0],
                num_pages=NUM_PAGES,
                page_size=PAGE_SIZE,
            )
            attention = self.kernels.plan_attention(layout, places, decode_only=decode_only)
            lm = self.step_model.bind(weights)
            batch = StepBatch(
                positions_T=places.position_T,
                num_tokens=layout.query_starts_S1[-1],
                attention=attention,
            )
            hidden_TD, pages_L = lm(token_ids_T, pages_L, batch)
            num_rows = jnp.asarray(hidden_TD.shape[0], jnp.int32)
            return lm.logits(hidden_TD, num_rows=num_rows), pages_L

        return quick_jit(step, donate_argnums=(1,))

    def empty_pages(self) -> tuple[Array, ...]:
        """Pages full of NaN: nothing may depend on what no token has written."""
        shape = self.definition.shape
        nan = np.full(
            (NUM_PAGES, shape.num_kv_heads, PAGE_SIZE, 2 * shape.head_dim),
            np.nan,
            jnp.dtype(self.dtype),
        ).view(self.kernels.kv_storage_dtype(self.dtype))
        sharding = sharding_of(self.mesh, "PKBC")
        return tuple(jax.device_put(nan, sharding) for _ in range(shape.num_layers))


class Session:
    """Sequences 0, 1, 2 of a model, empty at first."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.pages_L = model.empty_pages()
        self.num_cached = [0] * NUM_SEQS
        pages = np.random.default_rng(0).permutation(NUM_PAGES)[: NUM_SEQS * PAGES_PER_SEQ]
        self.page_table_RM = pages.reshape(NUM_SEQS, PAGES_PER_SEQ).astype(np.int32)

    def feed(
        self, tokens: Mapping[int, list[int]], *, decode_only: bool | None = None
    ) -> dict[int, np.ndarray]:
        """One step: the next tokens of some sequences -> float32 logits [T, V] of each.

        It is the step for decodes where it can be, unless `decode_only` is False.
        """
        order = sorted(tokens, key=lambda seq: len(tokens[seq]) > 1)  # decodes come first
        lengths = [len(tokens[seq]) for seq in order]
        if decode_only is None:
            decode_only = max(lengths) == 1
        padding = NUM_SEQS - len(order)
        layout = StepLayout(
            slots_S=np.array([*order, *[0] * padding], np.int32),
            starts_S=np.array([*(self.num_cached[s] for s in order), *[0] * padding], np.int32),
            query_starts_S1=np.cumsum([0, *lengths, *[0] * padding], dtype=np.int32),
            num_seqs=np.int32(len(order)),
            num_decodes=np.int32(lengths.count(1)),
            page_table_RM=self.page_table_RM,
        )
        token_ids_T = np.zeros(NUM_SEQS if decode_only else NUM_TOKENS, np.int32)
        token_ids_T[: sum(lengths)] = [token for seq in order for token in tokens[seq]]
        step = self.model.decode_step if decode_only else self.model.chunk_step
        logits_TV, self.pages_L = step(self.model.weights, self.pages_L, token_ids_T, layout)
        assert logits_TV.dtype == jnp.float32
        vocab_size = self.model.definition.shape.vocab_size
        rows = np.split(np.asarray(logits_TV)[: sum(lengths), :vocab_size], np.cumsum(lengths)[:-1])
        for seq in order:
            self.num_cached[seq] += len(tokens[seq])
        return dict(zip(order, rows, strict=True))

    def feed_in_chunks(self, tokens: list[int], sizes: list[int]) -> np.ndarray:
        """Sequence 0's next tokens over several steps -> logits of all of them."""
        assert sum(sizes) == len(tokens)
        parts = [part.tolist() for part in np.split(np.array(tokens), np.cumsum(sizes)[:-1])]
        return np.concatenate([self.feed({0: part})[0] for part in parts])
