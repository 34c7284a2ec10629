"""Chat messages of the OpenAI API -> the plain values that Hugging Face templates expect.

Knows the shape of messages; knows no template and no HTTP. Never changes the caller's objects.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from jaxinfer.errors import RequestError

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


def plain_messages(
    messages: Sequence[Mapping[str, Any]], *, keep_parts: bool, wrap_strings: bool
) -> list[dict[str, Any]]:
    """New messages for a template.

    - fields that are null are dropped: templates would print "None";
    - content given as text parts becomes one string, joined by newlines, unless `keep_parts`;
      with `wrap_strings` a string becomes one text part;
    - the arguments of tool calls are parsed: the API has JSON text, templates want the value;
    - reasoning is there under every name that templates use.

    Raises RequestError for an empty list, a message that is not an object with a role, parts
    that are not text, and arguments that are not JSON; its `param` is the path of the value.
    """
    if not messages:
        raise RequestError("messages must not be empty.", param="messages")
    return [
        _plain_message(message, f"messages[{index}]", keep_parts=keep_parts, wrap=wrap_strings)
        for index, message in enumerate(messages)
    ]


def _plain_message(message: Any, where: str, *, keep_parts: bool, wrap: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a string 'role'.", param=where)
    plain = {str(key): value for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list | tuple):
        parts = [_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        plain["content"] = parts if keep_parts else "\n".join(part["text"] for part in parts)
    elif isinstance(content, str):
        if wrap:
            plain["content"] = [{"type": "text", "text": content}]
    elif content is not None:
        raise RequestError(
            f"{where}.content must be a string or a list of text parts, "
            f"got {type(content).__name__}.",
            param=f"{where}.content",
        )
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            _plain_tool_call(call, f"{where}.tool_calls[{i}]")
            for i, call in enumerate(plain["tool_calls"])
        ]
    reasoning = next((plain[name] for name in _REASONING_NAMES if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _text_part(part: Any, where: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS:
        raise RequestError(
            f"{where}.type must be text, got {kind!r:.200}: this model reads text only.",
            param=f"{where}.type",
        )
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        name = f"{where}.{_TEXT_PARTS[kind]}"
        raise RequestError(f"{name} is required and must be a string.", param=name)
    return {"type": "text", "text": text}


def _plain_tool_call(call: Any, where: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{where}.function must be an object.", param=f"{where}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments) if arguments.strip() else {}
        except (msgspec.MsgspecError, RecursionError) as error:
            raise RequestError(
                f"{where}.function.arguments must be JSON, got {arguments!r:.200} ({error}).",
                param=f"{where}.function.arguments",
            ) from error
    return {**call, "function": {**function, "arguments": arguments or {}}}
