"""What changes the logits before sampling: masks, bans, biases, penalties. Temperature is not here.

Knows the sampler state and the flags that say which rows use which part of it. Each part runs
only when a row of the batch uses it. Order and meaning are vLLM's: allowed tokens, bad words,
min_tokens, bias, penalties.

Shapes: S sequences, V width of the logits (the vocabulary with its padding).
"""

import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.sampling.params import SamplingBatch
from jaxinfer.sampling.state import NO_TOKEN, SamplerState, unpack_bits

_FORBIDDEN = -jnp.inf


def process_logits(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Array:
    """Applies to each row what its flags ask for; the other rows come back unchanged."""
    steps = (
        (batch.use_allowed, _keep_allowed),
        (batch.use_bad_words, _ban_bad_words),
        (batch.ban_stop, _ban_stop_tokens),
        (batch.use_bias, _add_bias),
        (batch.use_penalties, _penalize),
    )
    for uses_S, apply in steps:
        logits_SV = lax.cond(
            jnp.any(uses_S),
            apply,
            lambda logits_SV, _batch, _state: logits_SV,
            logits_SV,
            batch,
            state,
        )
    return logits_SV


def mask_padding(logits_SV: Array, *, vocab_size: int) -> Array:
    """-inf for the logits that stand for no token."""
    width = logits_SV.shape[1]
    if width == vocab_size:
        return logits_SV
    assert width > vocab_size, (width, vocab_size)
    return jnp.where(lax.iota(jnp.int32, width) < vocab_size, logits_SV, _FORBIDDEN)


def _rows(leaf: Array, batch: SamplingBatch) -> Array:
    """The rows of the step's sequences; idle rows get any row, which their flags ignore."""
    return leaf.at[batch.slot].get(mode="clip")


def _fit(values_SN: Array, width: int) -> Array:
    """Cuts or zero-pads per-token values to the width of the logits."""
    values_SN = values_SN[:, :width]
    return jnp.pad(values_SN, ((0, 0), (0, width - values_SN.shape[1])))


def _keep_allowed(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Array:
    allowed_SV = _fit(unpack_bits(_rows(state.allowed_bits, batch)), logits_SV.shape[1])
    return jnp.where(allowed_SV | ~batch.use_allowed[:, None], logits_SV, _FORBIDDEN)


def _ban_bad_words(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Array:
    """Forbids the last token of each word whose other tokens are the newest output tokens."""
    words_SW8 = _rows(state.bad_words, batch)
    recent_S8 = _rows(state.recent, batch)
    begin_SW7 = words_SW8[:, :, :-1]
    is_same_SW7 = (begin_SW7 == NO_TOKEN) | (begin_SW7 == recent_S8[:, None, 1:])
    banned_SW = jnp.all(is_same_SW7, axis=-1) & batch.use_bad_words[:, None]
    return _forbid(logits_SV, words_SW8[:, :, -1], banned_SW)


def _ban_stop_tokens(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Array:
    ids_SN = _rows(state.stop_ids, batch)
    return _forbid(logits_SV, ids_SN, jnp.broadcast_to(batch.ban_stop[:, None], ids_SN.shape))


def _add_bias(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Array:
    ids_SN = _rows(state.bias_ids, batch)
    values_SN = jnp.where(batch.use_bias[:, None], _rows(state.bias_values, batch), 0.0)
    rows_S1 = lax.iota(jnp.int32, ids_SN.shape[0])[:, None]
    return logits_SV.at[rows_S1, ids_SN].add(values_SN, mode="drop")


def _penalize(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Array:
    """Repetition counts prompt and output (Keskar et al., "CTRL", 2019), the others the output."""
    width = logits_SV.shape[1]
    counts_SV = _fit(_rows(state.output_counts, batch), width)
    in_output_SV = counts_SV > 0
    in_prompt_SV = _fit(unpack_bits(_rows(state.prompt_bits, batch)), width)
    repetition_S1 = batch.repetition_penalty[:, None]
    # A tiny penalty may push a logit to +inf, which would make its probability NaN.
    promoted_SV = jnp.minimum(logits_SV / repetition_S1, jnp.finfo(jnp.float32).max)
    repeated_SV = jnp.where(logits_SV > 0, promoted_SV, logits_SV * repetition_S1)
    penalized_SV = jnp.where(in_output_SV | in_prompt_SV, repeated_SV, logits_SV)
    penalized_SV -= batch.frequency_penalty[:, None] * counts_SV.astype(jnp.float32)
    penalized_SV -= batch.presence_penalty[:, None] * in_output_SV.astype(jnp.float32)
    return jnp.where(batch.use_penalties[:, None], penalized_SV, logits_SV)


def _forbid(logits_SV: Array, ids_SN: Array, banned_SN: Array) -> Array:
    rows_S1 = lax.iota(jnp.int32, ids_SN.shape[0])[:, None]
    ids_SN = jnp.where(banned_SN, ids_SN, jnp.iinfo(jnp.int32).max)
    return logits_SV.at[rows_S1, ids_SN].set(_FORBIDDEN, mode="drop")
