"""Parts of answers that several routes share. Knows JSON shapes; no engine, no HTTP."""

import re
import uuid
from typing import Any

from jaxinfer.core.outputs import CompletionOutput
from jaxinfer.core.request import FinishReason
from jaxinfer.server.errors import ApiError

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


def request_suffix(client_id: str | None) -> str:
    """The part of ids after the dash: the client's own where it is printable, else a new one."""
    if client_id and _CLIENT_ID.fullmatch(client_id):
        return client_id
    return uuid.uuid4().hex


def usage(num_prompt: int, num_output: int, num_cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "total_tokens": num_prompt + num_output,
        "completion_tokens": num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def check_choice(choice: CompletionOutput) -> None:
    """Raises ApiError 500 for a completion that broke: its text must not look like an answer."""
    if choice.finish_reason == FinishReason.ERROR:
        raise ApiError(500, f"Generation failed: {choice.error}.")


def model_card(name: str, *, root: str, created_s: int, max_model_len: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "jaxinfer",
        "root": root,
        "parent": None,
        "max_model_len": max_model_len,
    }
