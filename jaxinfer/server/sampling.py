"""From request fields to `SamplingParams`. Knows names and defaults; no tokenizer, no HTTP."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxinfer.core.sampling_params import MAX_LOGPROBS, MODEL_DEFAULTS, SamplingParams
from jaxinfer.errors import RequestError
from jaxinfer.server.protocol import ChatCompletionRequest, CompletionRequest, GenerateRequest

_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "truncate_prompt_tokens",
)


class Sampling(NamedTuple):
    """`max_tokens_field` is the field in which the client gave max_tokens, None for a default."""

    params: SamplingParams
    max_tokens_field: str | None


def completion_sampling(
    request: CompletionRequest, defaults: Mapping[str, Any], *, max_tokens_given: bool
) -> Sampling:
    """Raises RequestError. `defaults` are the model's own (generation_config.json)."""
    fields = _common(request, defaults)
    fields["max_tokens"] = request.max_tokens
    if not max_tokens_given and "max_new_tokens" in defaults:
        fields["max_tokens"] = defaults["max_new_tokens"]
    if request.max_tokens == 0 and not request.echo:
        raise RequestError(
            "max_tokens must be at least 1, got 0 (0 is for echo=true).", param="max_tokens"
        )
    if request.logprobs is not None:
        fields["logprobs"] = request.logprobs
        if request.echo and request.prompt_logprobs is None:
            fields["prompt_logprobs"] = request.logprobs
    given = max_tokens_given and request.max_tokens is not None
    return Sampling(SamplingParams(**fields), "max_tokens" if given else None)


def chat_sampling(request: ChatCompletionRequest, defaults: Mapping[str, Any]) -> Sampling:
    """Raises RequestError. `defaults` are the model's own (generation_config.json)."""
    fields = _common(request, defaults)
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    limit: int | None = getattr(request, name)
    if limit is not None and limit < 1:
        raise RequestError(f"{name} must be at least 1, got {limit}.", param=name)
    fields["max_tokens"] = defaults.get("max_new_tokens") if limit is None else limit
    if request.logprobs:
        fields["logprobs"] = _top_logprobs(request.top_logprobs)
    elif request.top_logprobs:
        raise RequestError(
            "top_logprobs may only be given with logprobs=true.", param="top_logprobs"
        )
    return Sampling(SamplingParams(**fields), None if limit is None else name)


def _top_logprobs(count: int | None) -> int:
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {count}.",
            param="top_logprobs",
        )
    return count or 0


def _common(request: GenerateRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: defaults[name] for name in MODEL_DEFAULTS if name in defaults}
    for name in _SAME_NAME:
        value = getattr(request, name)
        if value is not None:
            fields[name] = value
    if request.stop is not None:
        fields["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    if request.logit_bias:
        fields["logit_bias"] = _logit_bias(request.logit_bias)
    return fields


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(
                f"logit_bias keys must be token ids, got {key[:40]!r}.", param="logit_bias"
            )
        bias[int(key)] = value
    return bias
