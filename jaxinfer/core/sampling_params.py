"""How to turn logits into tokens, for one request. Validated where it is made; no JAX, no HTTP."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from jaxinfer.errors import RequestError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 8

MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The settings of which a model may bring defaults (generation_config.json)."""


def model_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """How a generation_config.json wants to be sampled, and its `max_new_tokens`."""
    return {
        name: generation_config[name]
        for name in (*MODEL_DEFAULTS, "max_new_tokens")
        if generation_config.get(name) is not None
    }


def _check_range(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    """Raises RequestError unless `value` is finite and in [low, high] ((low, high] if open)."""
    if type(value) is float and low < value <= high:  # nearly always: 20 checks for each request
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, got {value!r}.", param=name)
    bracket = "(" if low_open else "["
    if not math.isfinite(value) or value > high or value < low or (low_open and value == low):
        raise RequestError(
            f"{name} must be in {bracket}{low:g}, {high:g}], got {value}.", param=name
        )


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is int and low <= value <= high:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}.", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name} must be between {low} and {high}, got {value}.", param=name)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling settings with vLLM's names and defaults.

    Raises `RequestError` (a ValueError) that names the field when a value cannot be used. Limits
    that depend on the model (vocabulary, context) are checked by `validate_for_model`.

    `bad_words_token_ids` and `stop` are filled from text by the tokenizer side: the engine core
    sees tokens only. A `seed` makes the tokens independent of whatever shares the batch.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = msgspec.field(default_factory=list)
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    bad_words: list[str] = msgspec.field(default_factory=list)
    bad_words_token_ids: list[list[int]] = msgspec.field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: whatever the context leaves
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 1e6, low_open=True)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        self._check_lengths()
        self._check_stops()
        self._check_token_lists()

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}.",
                param="min_tokens",
            )
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens is not None:
            _check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, 2**31 - 1)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}.",
                param="stop",
            )
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError("stop strings must be non-empty strings.", param="stop")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True.", param="stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids, "
                f"got {len(self.stop_token_ids)}.",
                param="stop_token_ids",
            )

    def _check_token_lists(self) -> None:
        if self.logit_bias is not None:
            if len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise RequestError(
                    f"logit_bias takes at most {MAX_LOGIT_BIAS} entries, "
                    f"got {len(self.logit_bias)}.",
                    param="logit_bias",
                )
            for token_id, bias in self.logit_bias.items():
                _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must not be empty.", param="allowed_token_ids")
        if max(len(self.bad_words), len(self.bad_words_token_ids)) > 2 * MAX_BAD_WORDS:
            raise RequestError(
                f"bad_words takes at most {MAX_BAD_WORDS} entries.", param="bad_words"
            )
        for word in self.bad_words_token_ids:
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                raise RequestError(
                    f"each of bad_words must be 1 to {MAX_BAD_WORD_TOKENS} tokens long, "
                    f"got {len(word)}.",
                    param="bad_words",
                )

    def validate_for_model(self, *, vocab_size: int) -> None:
        """Checks every token id against the vocabulary; raises RequestError."""
        lists = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": list(self.logit_bias or ()),
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": [token for word in self.bad_words_token_ids for token in word],
        }
        for param, token_ids in lists.items():
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{param} holds token id {token_id}, which is outside the vocabulary "
                        f"(0 to {vocab_size - 1}).",
                        param=param,
                    )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )
