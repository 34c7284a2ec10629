"""Log-probabilities of the raw distribution: of sampled tokens, and of a prompt's own tokens.

Raw means before masks, penalties and temperature, as in vLLM's default mode. Knows logits and
token ids; knows no requests.

Shapes: S sequences, T tokens of the step, V width of the logits, D model, K most likely tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from jaxinfer.core.sampling_params import MAX_LOGPROBS
from jaxinfer.parallel.rules import replicated
from jaxinfer.sampling.processors import mask_padding
from jaxinfer.sampling.select import top_tokens

_CHUNK = 64  # prompt positions whose logits exist at once


class Logprobs(NamedTuple):
    """For N positions; natural logs, float32. All zero where nobody in the batch wants them."""

    token_logprob_N: np.ndarray  # float32, of the given token
    rank_N: np.ndarray  # int32, 1 = most likely; equals share the best rank
    top_ids_NK: np.ndarray  # int32, most likely first, lower id first among equals
    top_logprobs_NK: np.ndarray  # float32


def unpack_logprobs(packed_NW: np.ndarray) -> Logprobs:
    """The fields of what the functions below give, on the host."""
    num_top = packed_NW.shape[1] // 2 - 1
    logprob_NK = packed_NW[:, : 1 + num_top].view(np.float32)
    return Logprobs(
        token_logprob_N=logprob_NK[:, 0],
        rank_N=packed_NW[:, 1 + num_top],
        top_ids_NK=packed_NW[:, 2 + num_top :],
        top_logprobs_NK=logprob_NK[:, 1:],
    )


def token_logprobs(
    logits_SV: Array,
    token_S: Array,
    wanted_S: Array,
    *,
    vocab_size: int,
    mesh: Mesh,
    num_top: int = MAX_LOGPROBS,
) -> Array:
    """Log-probabilities of one token a row of raw float32 logits, and of the K likeliest.

    Computed for all rows if any is wanted, for none otherwise. Packed, int32 [S, 2 + 2K]. Logits
    that are split over `mesh` are brought together only then.
    """
    num_top = min(num_top, vocab_size)

    def compute() -> Array:
        whole_SV = lax.with_sharding_constraint(logits_SV, replicated(mesh))
        return _logprobs(mask_padding(whole_SV, vocab_size=vocab_size), token_S, num_top)

    return lax.cond(jnp.any(wanted_S), compute, lambda: _no_logprobs(token_S.shape[0], num_top))


def prompt_logprobs(
    hidden_TD: Array,
    target_T: Array,
    wanted_T: Array,
    *,
    logits_of: Callable[[Array], Array],
    vocab_size: int,
    mesh: Mesh,
    num_top: int = MAX_LOGPROBS,
) -> Array:
    """Log-probabilities of `target_T[t]`, the token after t, for each position of the step.

    `logits_of` maps final hidden states [64, D] to raw float32 logits [64, V]. Positions are taken
    64 at a time, so the logits of the whole step never exist; chunks that nobody wants are skipped.
    Packed, int32 [T, 2 + 2K].
    """
    num_tokens = target_T.shape[0]
    num_top = min(num_top, vocab_size)
    chunk = min(_CHUNK, num_tokens)
    num_chunks = -(-num_tokens // chunk)

    def in_chunks(values: Array) -> Array:
        padding = ((0, num_chunks * chunk - num_tokens),) + ((0, 0),) * (values.ndim - 1)
        return jnp.pad(values, padding).reshape(num_chunks, chunk, *values.shape[1:])

    def one_chunk(args: tuple[Array, Array, Array]) -> Array:
        hidden_CD, target_C, wanted_C = args

        def compute() -> Array:
            whole_CV = lax.with_sharding_constraint(logits_of(hidden_CD), replicated(mesh))
            return _logprobs(mask_padding(whole_CV, vocab_size=vocab_size), target_C, num_top)

        return lax.cond(jnp.any(wanted_C), compute, lambda: _no_logprobs(chunk, num_top))

    chunks = (in_chunks(hidden_TD), in_chunks(target_T), in_chunks(wanted_T))
    packed_TW = lax.map(one_chunk, chunks)
    return packed_TW.reshape(-1, packed_TW.shape[-1])[:num_tokens]


def _logprobs(logits_NV: Array, token_N: Array, num_top: int) -> Array:
    """Packed: the log-probabilities of the token and of the likeliest, the rank, the likeliest."""
    top_ids_NK = top_tokens(logits_NV, num_top)
    ids_NK = jnp.concatenate([token_N[:, None], top_ids_NK], axis=1)
    logit_NK = jnp.take_along_axis(logits_NV, ids_NK, axis=1, mode="clip")
    # Counted in floats, exact below 2**24: XLA:CPU has such sums ready, integer ones it compiles.
    num_better_N1 = jnp.sum(
        (logits_NV > logit_NK[:, :1]).astype(jnp.float32), axis=1, keepdims=True
    )
    best_N1 = jnp.max(logits_NV, axis=1, keepdims=True)
    log_sum_N1 = jnp.log(jnp.sum(jnp.exp(logits_NV - best_N1), axis=1, keepdims=True))
    logprob_NK = lax.bitcast_convert_type(logit_NK - best_N1 - log_sum_N1, jnp.int32)
    return jnp.concatenate([logprob_NK, num_better_N1.astype(jnp.int32) + 1, top_ids_NK], axis=1)


def _no_logprobs(num: int, num_top: int) -> Array:
    return jnp.zeros((num, 2 + 2 * num_top), jnp.int32)
