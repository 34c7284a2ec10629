"""From what a user passes as a prompt to token ids that the engine will take.

Everything that can be wrong with a request is found here, before any work: RequestError names the
field. Knows the tokenizer and the engine's limits; must not know queues, messages or HTTP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec

from jaxinfer.core.messages import EngineInfo
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.admission import check_prompt, max_prompt_tokens
from jaxinfer.errors import RequestError
from jaxinfer.logging import get_logger
from jaxinfer.tokenizer.bad_words import bad_words_to_token_ids
from jaxinfer.tokenizer.tokenizer import Tokenizer

logger = get_logger(__name__)


class TokensPrompt(TypedDict):
    """A prompt that is tokenized already."""

    prompt_token_ids: list[int]


class TextPrompt(TypedDict):
    prompt: str


Prompt = str | list[int] | TokensPrompt | TextPrompt | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ValidatedPrompt:
    """A request that the engine will take, unless its queue is full."""

    text: str | None
    prompt_token_ids: list[int]
    params: SamplingParams  # ready for the core; validating it again changes nothing


class InputProcessor:
    """Checks and tokenizes; stateless, safe in any thread."""

    def __init__(self, tokenizer: Tokenizer, info: EngineInfo) -> None:
        self._tokenizer = tokenizer
        self._info = info
        if tokenizer.vocab_size > info.vocab_size:
            # No error: some fine-tunes add tokens to the tokenizer that the model never got.
            logger.warning(
                "the tokenizer has %d tokens but the model only %d: text that needs the others "
                "will be refused. Is --tokenizer the model's own?",
                tokenizer.vocab_size,
                info.vocab_size,
            )

    def validate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        add_special_tokens: bool = True,
        clamp_max_tokens: bool = False,
        param: str = "prompt",
    ) -> ValidatedPrompt:
        """Raises RequestError for all that is wrong; `param` names the prompt's field in it.

        `max_tokens` above what the context leaves is an error, or is lowered with
        `clamp_max_tokens` (for a default that the user did not choose).
        """
        text, token_ids = self._tokenize(prompt, add_special_tokens=add_special_tokens, param=param)
        token_ids = self._truncate(token_ids, params)
        check_prompt(token_ids, max_tokens=params.max_tokens, info=self._info, param=param)
        params = self._check_params(params, len(token_ids), clamp_max_tokens=clamp_max_tokens)
        return ValidatedPrompt(text=text, prompt_token_ids=token_ids, params=params)

    def _tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool, param: str
    ) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise RequestError(
                    f"{param} must hold 'prompt' (text) or 'prompt_token_ids', "
                    f"got the keys {sorted(map(str, prompt))}.",
                    param=param,
                )
            text = prompt.get("prompt")
            ids = prompt.get("prompt_token_ids")
        elif isinstance(prompt, str):
            text, ids = prompt, None
        else:
            text, ids = None, prompt
        if ids is not None:
            _check_ids(ids, param)
            return text, list(ids)
        if not isinstance(text, str):
            raise RequestError(
                f"{param} must be a string or a list of token ids, got {type(prompt).__name__}.",
                param=param,
            )
        return text, self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _truncate(self, token_ids: list[int], params: SamplingParams) -> list[int]:
        """Keeps the last tokens, as many as asked for; -1 stands for as many as fit."""
        keep = params.truncate_prompt_tokens
        if keep is None:
            return token_ids
        limit = max_prompt_tokens(self._info.max_model_len, params.max_tokens)
        if keep > limit or keep == 0:
            raise RequestError(
                f"truncate_prompt_tokens must be -1 or between 1 and {limit}, got {keep}.",
                param="truncate_prompt_tokens",
            )
        if keep == -1:
            keep = max(1, min(limit, self._info.max_model_len - (params.max_tokens or 0)))
        return token_ids[-keep:]

    def _check_params(
        self, params: SamplingParams, num_prompt: int, *, clamp_max_tokens: bool
    ) -> SamplingParams:
        max_tokens = params.max_tokens
        room = self._info.max_model_len - num_prompt
        if max_tokens is not None and max_tokens > room:
            if not clamp_max_tokens:
                raise RequestError(
                    f"max_tokens={max_tokens} is too large: the prompt has {num_prompt} tokens and "
                    f"this model's maximum context length is {self._info.max_model_len} tokens. "
                    f"The largest max_tokens for this prompt is {room}.",
                    param="max_tokens",
                )
            params = msgspec.structs.replace(
                params, max_tokens=room, min_tokens=min(params.min_tokens, room)
            )
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > self._info.max_logprobs:
                raise RequestError(
                    f"{name} must be at most {self._info.max_logprobs}, got {asked}.", param=name
                )
        if params.bad_words:
            token_ids = bad_words_to_token_ids(params.bad_words, self._tokenizer)
            params = msgspec.structs.replace(
                params,
                bad_words=[],
                bad_words_token_ids=params.bad_words_token_ids + token_ids,
            )
        if params.truncate_prompt_tokens is not None:
            params = msgspec.structs.replace(params, truncate_prompt_tokens=None)
        params.validate_for_model(vocab_size=self._info.vocab_size)
        return params


def _check_ids(ids: Any, param: str) -> None:
    if not isinstance(ids, list | tuple):
        raise RequestError(
            f"{param} must be a string or a list of token ids, got {type(ids).__name__}.",
            param=param,
        )
    for token_id in ids:
        if type(token_id) is not int:  # a bool is no token id
            raise RequestError(
                f"{param} must hold integers (token ids), got {token_id!r}.", param=param
            )
