"""Chat messages as clients send them, made ready for a template.

Knows roles and content parts; not templates. A `developer` message is a `system` message: few
templates know OpenAI's newer name. Arguments of earlier tool calls are JSON text in the API and
objects in templates.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from jaxinfer.errors import RequestError
from jaxinfer.server.body import show
from jaxinfer.server.protocol import ChatMessage

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")


def conversation(messages: Sequence[ChatMessage], raw: Sequence[Any]) -> list[dict[str, Any]]:
    """What a template reads. Raises RequestError that names the message."""
    if not messages:
        raise RequestError("messages must not be empty.", param="messages")
    return [
        _message(f"messages[{index}]", message, dict(raw[index]))
        for index, message in enumerate(messages)
    ]


def last_text(messages: Sequence[ChatMessage], role: str) -> str:
    """The text of the last message if `role` wrote it: what `echo` repeats."""
    last = messages[-1]
    if last.role != role or last.content is None:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "".join(part.text or "" for part in last.content)


def _message(where: str, message: ChatMessage, plain: dict[str, Any]) -> dict[str, Any]:
    if message.role not in _ROLES:
        raise RequestError(
            f"{where}.role must be one of {', '.join(_ROLES)}, got {show(message.role)}.",
            param=f"{where}.role",
        )
    if message.role == "developer":
        plain["role"] = "system"
    if message.content is None:
        if message.role != "assistant" or not message.tool_calls:
            raise RequestError(
                f"{where}.content is required in a message of role {message.role}.",
                param=f"{where}.content",
            )
    elif not isinstance(message.content, str):
        plain["content"] = [
            _part(f"{where}.content[{index}]", part.type, part.text)
            for index, part in enumerate(message.content)
        ]
    if message.tool_calls:
        plain["tool_calls"] = [
            _tool_call(f"{where}.tool_calls[{index}]", call)
            for index, call in enumerate(message.tool_calls)
        ]
    return plain


def _part(where: str, kind: str, text: str | None) -> dict[str, str]:
    if kind not in _TEXT_PARTS:
        raise RequestError(
            f"{where}.type must be text, got {show(kind)}: the model reads text only.",
            param=f"{where}.type",
        )
    if text is None:
        raise RequestError(f"{where}.text is required.", param=f"{where}.text")
    return {"type": "text", "text": text}


def _tool_call(where: str, call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function must be an object.", param=f"{where}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.MsgspecError, RecursionError):
            raise RequestError(
                f"{where}.function.arguments must be JSON, got {show(arguments)}.",
                param=f"{where}.function.arguments",
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}
