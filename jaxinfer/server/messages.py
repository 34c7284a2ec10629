"""Chat messages as clients send them, and the text that the model's template makes of them.

Knows which roles there are and what a message must have; parts and tool calls are checked and
read in tokenizer/messages.py, for all who render. A `developer` message is a `system` message: few
templates know OpenAI's newer name.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.errors import RequestError
from jaxinfer.server.body import show
from jaxinfer.server.protocol import ChatCompletionRequest, ChatMessage, TokenizeRequest
from jaxinfer.server.state import Serving

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Above this, rendering takes longer than a step of the event loop may.
_LONG_CHAT_BYTES = 20_000


def conversation(messages: Sequence[ChatMessage], raw: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages with known roles. Raises RequestError that names the message."""
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
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise RequestError(
            f"{where}.content is required in a message of role {message.role}.",
            param=f"{where}.content",
        )
    return plain


async def render(
    serving: Serving,
    body: ChatCompletionRequest | TokenizeRequest,
    raw: Mapping[str, Any],
    *,
    num_bytes: int | None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None,
) -> str:
    """The prompt's text. `num_bytes` is the request's size: a long one is rendered off the loop.

    Raises RequestError for what is wrong with the messages, or what the template refuses.
    """
    messages = conversation(body.messages or (), raw["messages"])
    continues = bool(body.continue_final_message)
    generates = body.add_generation_prompt

    def work() -> str:
        return serving.tokenizer.render_chat(
            messages,
            add_generation_prompt=not continues if generates is None else generates,
            continue_final_message=continues,
            tools=body.tools or None,
            documents=documents,
            template_kwargs=template_kwargs or {},
        )

    is_short = num_bytes is not None and num_bytes <= _LONG_CHAT_BYTES
    return work() if is_short else await asyncio.to_thread(work)
