"""The one jitted step: packed words in, sampled tokens out, everything else stays on the device.

Knows the model's interface, the sampler and the attention metadata; knows no requests and no
scheduling. One function is compiled per bucket.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from jaxinfer.core.step import PENDING_TOKEN
from jaxinfer.layers.batch_types import StepBatch
from jaxinfer.models.base import CausalLM
from jaxinfer.runner.buckets import Bucket
from jaxinfer.runner.packing import StepInputs, unpack_step
from jaxinfer.sampling.logprobs import prompt_logprobs, token_logprobs
from jaxinfer.sampling.params import unpack_sampling
from jaxinfer.sampling.sampler import sample
from jaxinfer.sampling.state import SamplerState
from pallas_kernels.dispatch import KernelSet
from pallas_kernels.paged_attention.api import StepLayout, TokenPlaces, locate_tokens

NO_TOKEN = -1
"""Sampled token of a row whose logits broke."""


class DeviceState(NamedTuple):
    """What the device remembers of every slot; donated through each step."""

    page_table_RM: Array  # int32 [R, M]
    sampler: SamplerState


class StepResult(NamedTuple):
    """What a step gives back; small, copied to the host as needed."""

    tokens_S: Array  # int32, NO_TOKEN where the logits were broken
    logprobs_SW: Array  # int32, of tokens_S; see sampling/logprobs.py
    prompt_logprobs_TW: Array | None  # of each token's successor; None in decode-only buckets


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """The model as a function of flat arrays: passing modules through jit costs host time."""

    graphdef: nnx.GraphDef
    paths: tuple[tuple, ...]  # of the parameters, in the order of the weights tuple
    variables: tuple[nnx.Variable, ...]  # abstract, carry the parameters' metadata
    kernels: KernelSet
    mesh: Mesh
    vocab_size: int
    page_size: int
    num_pages: int

    def bind(self, weights: Sequence[Array]) -> CausalLM:
        """The module with these weights; only ever called while tracing."""
        flat = [
            (path, variable.replace(weight))
            for path, variable, weight in zip(self.paths, self.variables, weights, strict=True)
        ]
        return cast(CausalLM, nnx.merge(self.graphdef, nnx.from_flat_state(flat)))


StepFunction = Callable[
    [tuple[Array, ...], tuple[Array, ...], DeviceState, Array],
    tuple[tuple[Array, ...], DeviceState, StepResult],
]
"""(weights, pages of each layer, state, words) -> (pages, state, result)."""


class ModelInputs(NamedTuple):
    """A step's words, made ready for the model."""

    inputs: StepInputs
    places: TokenPlaces
    page_table_RM: Array
    token_ids_T: Array
    batch: StepBatch


def prepare_inputs(
    model: StepModel, bucket: Bucket, state: DeviceState, words: Array
) -> ModelInputs:
    """All that a step does before its model runs."""
    inputs = unpack_step(words, bucket, model.page_size)
    page_table_RM = state.page_table_RM.at[inputs.page_slots_U, inputs.page_columns_U].set(
        inputs.page_ids_U, mode="drop"
    )
    layout = StepLayout(
        slots_S=inputs.slots_S,
        starts_S=inputs.starts_S,
        query_starts_S1=inputs.query_starts_S1,
        num_seqs=inputs.num_seqs,
        num_decodes=inputs.num_decodes,
        page_table_RM=page_table_RM,
    )
    places = locate_tokens(
        layout,
        num_tokens=bucket.num_tokens,
        num_pages=model.num_pages,
        page_size=model.page_size,
    )
    last_token_T = state.sampler.recent[inputs.slots_S[places.seq_T], -1]
    token_ids_T = jnp.where(inputs.token_ids_T == PENDING_TOKEN, last_token_T, inputs.token_ids_T)
    batch = StepBatch(
        positions_T=places.position_T,
        num_tokens=inputs.query_starts_S1[-1],
        attention=model.kernels.plan_attention(layout, places, decode_only=bucket.decode_only),
    )
    return ModelInputs(
        inputs=inputs,
        places=places,
        page_table_RM=page_table_RM,
        token_ids_T=token_ids_T,
        batch=batch,
    )


def make_step(model: StepModel, bucket: Bucket) -> StepFunction:
    """The step of one bucket; jit it with pages and state donated."""

    def step(
        weights: tuple[Array, ...], pages_L: tuple[Array, ...], state: DeviceState, words: Array
    ) -> tuple[tuple[Array, ...], DeviceState, StepResult]:
        inputs, places, page_table_RM, token_ids_T, batch = prepare_inputs(
            model, bucket, state, words
        )
        lm = model.bind(weights)
        hidden_TD, pages_L = lm(token_ids_T, pages_L, batch)
        last_S = jnp.maximum(inputs.query_starts_S1[1:] - 1, 0)
        logits_SV = lm.logits(hidden_TD[last_S], num_rows=inputs.num_seqs)
        result, sampler = _sample(model, inputs, logits_SV, state.sampler)
        if not bucket.decode_only:
            result = result._replace(
                prompt_logprobs_TW=_prompt_logprobs(model, lm, inputs, places, hidden_TD)
            )
        return pages_L, DeviceState(page_table_RM=page_table_RM, sampler=sampler), result

    return step


def _sample(
    model: StepModel, inputs: StepInputs, logits_SV: Array, sampler: SamplerState
) -> tuple[StepResult, SamplerState]:
    sampling = unpack_sampling(inputs.sampling_SW)
    sampled, sampler = sample(
        logits_SV, sampling, sampler, vocab_size=model.vocab_size, mesh=model.mesh
    )
    logprobs_SW = token_logprobs(
        logits_SV,
        sampled.token_S,
        sampling.wants_logprobs,
        vocab_size=model.vocab_size,
        mesh=model.mesh,
    )
    result = StepResult(
        tokens_S=jnp.where(sampled.ok_S, sampled.token_S, NO_TOKEN),
        logprobs_SW=logprobs_SW,
        prompt_logprobs_TW=None,
    )
    return result, sampler


def _prompt_logprobs(
    model: StepModel, lm: CausalLM, inputs: StepInputs, places: TokenPlaces, hidden_TD: Array
) -> Array:
    """Of the token behind each token: its neighbour, or `next_token_S` at a chunk's end."""
    num_tokens = places.seq_T.shape[0]
    is_last_T = jnp.arange(num_tokens) == inputs.query_starts_S1[places.seq_T + 1] - 1
    successor_T = jnp.roll(inputs.token_ids_T, -1)
    target_T = jnp.where(is_last_T, inputs.next_token_S[places.seq_T], successor_T)
    is_wanted_T = (inputs.wants_prompt_S[places.seq_T] == 1) & (target_T >= 0)
    return prompt_logprobs(
        hidden_TD,
        jnp.maximum(target_T, 0),
        is_wanted_T,
        logits_of=lambda hidden_CD: lm.logits(
            hidden_CD, num_rows=jnp.asarray(hidden_CD.shape[0], jnp.int32)
        ),
        vocab_size=model.vocab_size,
        mesh=model.mesh,
    )
