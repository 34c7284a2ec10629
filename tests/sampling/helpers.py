"""Runs the sampler as the runner does: packed settings, gathered rows, one jitted call."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.parallel.mesh import make_mesh
from jaxinfer.sampling.params import pack_sampling, step_words, unpack_sampling
from jaxinfer.sampling.sampler import sample
from jaxinfer.sampling.state import (
    SamplerState,
    init_state,
    needs_slot_row,
    slot_row,
    write_slot,
)

_write_slot = jax.jit(write_slot, donate_argnums=0)


@partial(jax.jit, static_argnames="vocab_size", donate_argnums=2)
def _step(logits_SV, words_SW, state, *, vocab_size):
    mesh = make_mesh(tensor=1, devices=jax.devices())
    return sample(logits_SV, unpack_sampling(words_SW), state, vocab_size=vocab_size, mesh=mesh)


class Seq(NamedTuple):
    """One sequence of a step."""

    params: SamplingParams
    slot: int = 0
    output_index: int = 0
    samples: bool = True
    default_seed: int = 0


class Result(NamedTuple):
    token: list[int]
    ok: list[bool]


class Sampler:
    """The device side of a few slots."""

    def __init__(self, *, vocab_size: int, max_num_seqs: int = 64) -> None:
        self.vocab_size = vocab_size
        self.max_num_seqs = max_num_seqs
        self.state: SamplerState = init_state(max_num_seqs=max_num_seqs, vocab_size=vocab_size)

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        *,
        prompt: Sequence[int] = (),
        output: Sequence[int] = (),
        eos: Sequence[int] = (),
    ) -> None:
        assert needs_slot_row(params)
        row = slot_row(
            params,
            prompt_token_ids=prompt,
            output_token_ids=output,
            eos_token_ids=eos,
            vocab_size=self.vocab_size,
        )
        self.state = _write_slot(self.state, np.int32(slot), row)

    def step(self, logits_SV: np.ndarray, seqs: Sequence[Seq]) -> Result:
        table_RW = np.stack([pack_sampling(SamplingParams(), default_seed=0)] * self.max_num_seqs)
        for seq in seqs:
            table_RW[seq.slot] = pack_sampling(seq.params, default_seed=seq.default_seed)
        words_SW = step_words(
            table_RW,
            slots_S=np.array([seq.slot for seq in seqs]),
            output_indices_S=np.array([seq.output_index for seq in seqs]),
            samples_S=np.array([seq.samples for seq in seqs]),
        )
        with jax.numpy_dtype_promotion("strict"):
            sampled, self.state = _step(
                jnp.asarray(logits_SV, jnp.float32),
                jnp.asarray(words_SW),
                self.state,
                vocab_size=self.vocab_size,
            )
        return Result(np.asarray(sampled.token_S).tolist(), np.asarray(sampled.ok_S).tolist())
