"""What changes the logits before sampling: masks, bans, biases, penalties. Temperature is not here.

Knows the sampler state and the flags that say which rows use which part of it. The meaning is
vLLM's: allowed tokens, bad words, min_tokens, bias, penalties, in this order. Two passes do it,
each only when a row of the batch needs it: over the tokens that lists name, and over all tokens.
A ban holds against everything after it, so the allowed tokens can come last.

Shapes: S sequences, V width of the logits (the vocabulary with its padding), N tokens of a list.
"""

import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.sampling.params import SamplingBatch
from jaxinfer.sampling.state import NO_TOKEN, SamplerState, unpack_bits

_FORBIDDEN = -jnp.inf


def process_logits(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Array:
    """Applies to each row what its flags ask for; the other rows come back unchanged."""
    for changed_S, change in (
        (batch.changes_some, _change_listed),
        (batch.changes_all, _change_all),
    ):
        logits_SV = lax.cond(
            jnp.any(changed_S),
            change,
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


def _change_listed(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Array:
    """Adds to the listed tokens: -inf for bad words and stop tokens, the bias of biased ones."""
    last_SW, banned_SW = _bad_words(batch, state)
    stop_SN = _rows(state.stop_ids, batch)
    bias_SN = jnp.where(batch.use_bias[:, None], _rows(state.bias_values, batch), 0.0)
    ids_SN = jnp.concatenate([last_SW, stop_SN, _rows(state.bias_ids, batch)], axis=1)
    added_SN = jnp.concatenate(
        [
            jnp.where(banned_SW, _FORBIDDEN, 0.0),
            jnp.broadcast_to(jnp.where(batch.ban_stop[:, None], _FORBIDDEN, 0.0), stop_SN.shape),
            bias_SN,
        ],
        axis=1,
    )
    rows_S1 = lax.iota(jnp.int32, ids_SN.shape[0])[:, None]
    return logits_SV.at[rows_S1, ids_SN].add(added_SN, mode="drop")


def _bad_words(batch: SamplingBatch, state: SamplerState) -> tuple[Array, Array]:
    """The last token of each word, and whether its other tokens are the newest output tokens."""
    words_SW8 = _rows(state.bad_words, batch)
    recent_S8 = _rows(state.recent, batch)
    begin_SW7 = words_SW8[:, :, :-1]
    is_same_SW7 = (begin_SW7 == NO_TOKEN) | (begin_SW7 == recent_S8[:, None, 1:])
    return words_SW8[:, :, -1], jnp.all(is_same_SW7, axis=-1) & batch.use_bad_words[:, None]


def _change_all(logits_SV: Array, batch: SamplingBatch, state: SamplerState) -> Array:
    """Penalties, then only the allowed tokens.

    Repetition counts prompt and output (Keskar et al., "CTRL", 2019), the others the output.
    """
    width = logits_SV.shape[1]
    counts_SV = _fit(_rows(state.output_counts, batch), width)
    in_output_SV = counts_SV > 0
    in_prompt_SV = _fit(unpack_bits(_rows(state.prompt_bits, batch)), width)
    allowed_SV = _fit(unpack_bits(_rows(state.allowed_bits, batch)), width)
    repetition_S1 = batch.repetition_penalty[:, None]
    # A tiny penalty may push a logit to +inf, which would make its probability NaN.
    promoted_SV = jnp.minimum(logits_SV / repetition_S1, jnp.finfo(jnp.float32).max)
    repeated_SV = jnp.where(logits_SV > 0, promoted_SV, logits_SV * repetition_S1)
    penalized_SV = jnp.where(in_output_SV | in_prompt_SV, repeated_SV, logits_SV)
    penalized_SV -= batch.frequency_penalty[:, None] * counts_SV.astype(jnp.float32)
    penalized_SV -= batch.presence_penalty[:, None] * in_output_SV.astype(jnp.float32)
    logits_SV = jnp.where(batch.use_penalties[:, None], penalized_SV, logits_SV)
    return jnp.where(allowed_SV | ~batch.use_allowed[:, None], logits_SV, _FORBIDDEN)


def _rows(leaf: Array, batch: SamplingBatch) -> Array:
    """The rows of the step's sequences; idle rows get any row, which their flags ignore."""
    return leaf.at[batch.slot].get(mode="clip")


def _fit(values_SN: Array, width: int) -> Array:
    """Cuts or zero-pads per-token values to the width of the logits."""
    values_SN = values_SN[:, :width]
    return jnp.pad(values_SN, ((0, 0), (0, width - values_SN.shape[1])))
