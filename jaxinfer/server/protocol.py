"""The request bodies of the HTTP interface as typed structs, and what they refuse.

Names and defaults are OpenAI's, then vLLM's. Every field is listed: one that has an effect, one
that is known to have none here ("quiet"), and one that cannot be honoured yet and is refused by
name, so that nothing a client asks for is dropped in silence. null means "not given".
Knows nothing of engines, tokenizers or HTTP.
"""

from functools import cache
from typing import Any

import msgspec

from jaxinfer.errors import RequestError
from jaxinfer.server.body import show

MAX_CACHE_SALT_CHARS = 128
_PRIORITY_LIMIT = 2**31


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # quiet: this server never pads its frames


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What completions and chat completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None

    # Quiet: no effect on the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    # Refused by `refuse_unsupported` when they ask for something.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    prompt_embeds: Any = None
    logprob_token_ids: Any = None
    repetition_detection: Any = None
    thinking_token_budget: Any = None
    kv_transfer_params: Any = None
    truncation_side: Any = None
    return_token_offsets: Any = None


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    suffix: str | None = None  # refused


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message's content; only text can be read."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message; what a template may read besides stays in the raw object."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatCompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None  # handed to the chat template
    tools: list[dict[str, Any]] | None = None  # shown to the template with tool_choice "none"
    tool_choice: Any = None

    parallel_tool_calls: Any = None  # quiet
    prediction: Any = None  # quiet: a hint

    chat_template: Any = None  # refused, as all below
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


_REFUSED_WHEN_GIVEN = {
    "structured_outputs": "structured output",
    "guided_json": "structured output",
    "guided_regex": "structured output",
    "guided_choice": "structured output",
    "guided_grammar": "structured output",
    "use_beam_search": "beam search",
    "prompt_embeds": "a prompt of embeddings",
    "logprob_token_ids": "log-probabilities of chosen tokens",
    "repetition_detection": "repetition detection",
    "thinking_token_budget": "a budget for reasoning",
    "kv_transfer_params": "transfer of KV pages",
    "return_token_offsets": "token offsets",
    "suffix": "text infilling",
    "chat_template": "a chat template of the request (the server has --chat-template)",
    "functions": "tool calling",
    "function_call": "tool calling",
    "audio": "audio",
    "web_search_options": "web search",
}
_ASKS_FOR_NOTHING: tuple[Any, ...] = (False, [], {}, "")


@cache
def _refused_fields(struct: type[GenerateRequest]) -> tuple[str, ...]:
    return tuple(name for name in struct.__struct_fields__ if name in _REFUSED_WHEN_GIVEN)


def refuse_unsupported(request: GenerateRequest) -> None:
    """Raises RequestError, naming the field, for what this version cannot do."""
    for name in _refused_fields(type(request)):
        value = getattr(request, name)
        if value is not None and value not in _ASKS_FOR_NOTHING:
            raise _unsupported(name, value, _REFUSED_WHEN_GIVEN[name])
    _refuse_response_format(request.response_format)
    if request.best_of not in (None, request.n or 1):
        raise RequestError(
            f"best_of must equal n={request.n or 1} in this version, got {show(request.best_of)}; "
            "ask for n and choose among them.",
            param="best_of",
        )
    if request.truncation_side not in (None, "left"):
        raise _unsupported("truncation_side", request.truncation_side, 'any side but "left"')
    if isinstance(request, ChatCompletionRequest):
        _refuse_tools(request)
        if request.modalities not in (None, [], ["text"]):
            raise _unsupported("modalities", request.modalities, 'any modality but "text"')


def check_common(request: GenerateRequest) -> None:
    """Checks between fields that no later stage makes; raises RequestError."""
    if request.stream_options is not None and not request.stream:
        raise RequestError(
            "stream_options may only be given with stream=true.", param="stream_options"
        )
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs cannot be streamed; send stream=false.", param="prompt_logprobs"
        )
    if request.priority is not None and not -_PRIORITY_LIMIT <= request.priority < _PRIORITY_LIMIT:
        raise RequestError(
            f"priority must be between {-_PRIORITY_LIMIT} and {_PRIORITY_LIMIT - 1}, "
            f"got {request.priority}.",
            param="priority",
        )
    salt = request.cache_salt
    if salt is not None and not 1 <= len(salt) <= MAX_CACHE_SALT_CHARS:
        raise RequestError(
            f"cache_salt must be 1 to {MAX_CACHE_SALT_CHARS} characters long, got {len(salt)}.",
            param="cache_salt",
        )


def _unsupported(name: str, value: Any, feature: str) -> RequestError:
    return RequestError(
        f"{name}={show(value)}: {feature} is not supported by this version; remove the field.",
        param=name,
    )


def _refuse_response_format(value: Any) -> None:
    if value is None or value == {"type": "text"}:
        return
    kind = value.get("type") if isinstance(value, dict) else value
    raise RequestError(
        f'response_format must be {{"type": "text"}} in this version, got type {show(kind)}: '
        "structured output is not supported yet.",
        param="response_format",
    )


def _refuse_tools(request: ChatCompletionRequest) -> None:
    choice = request.tool_choice
    if request.tools and choice != "none":
        raise RequestError(
            "tools: tool calling is not supported by this version; remove tools or send "
            'tool_choice "none".',
            param="tools",
        )
    if choice not in (None, "none", "auto"):
        raise RequestError(
            f"tool_choice={show(choice)}: tool calling is not supported by this version; "
            "remove the field.",
            param="tool_choice",
        )
