"""The record of a line: its JSON form, and the columns of its Parquet form.

The JSON form is that of OpenAI's batch output with vLLM's `error`, plus `line`: the number by
which a job that is started again knows what is done. Knows no files.
"""

import uuid
from typing import Any

import msgspec

from jaxinfer.batch.lines import BadLine, Line, Reply


class Numbered(msgspec.Struct, frozen=True):
    """All that a job which goes on must read of a record."""

    line: int


_numbered = msgspec.json.Decoder(Numbered)
_encoder = msgspec.json.Encoder()


def record_of(line: Line, reply: Reply) -> dict[str, Any]:
    """The record of a line that was answered, well or with an error status."""
    error = None if reply.status == 200 else reply.body.get("error")
    return _record(line, reply.status, reply.request_id, reply.body, error)


def bad_record(line: BadLine) -> dict[str, Any]:
    """The record of a line that was no request; it reads like a refused one."""
    error = {
        "message": f"{line.where}: {line.message}",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }
    return _record(line, 400, uuid.uuid4().hex, {"error": error}, error)


def _record(
    line: Line | BadLine,
    status: int,
    request_id: str,
    body: dict[str, Any],
    error: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{request_id}",
        "custom_id": line.custom_id,
        "line": line.number,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": error,
    }


def encode(record: dict[str, Any]) -> bytes:
    """One line of JSON, with its end."""
    return _encoder.encode(record) + b"\n"


def line_number(raw: bytes) -> int:
    """The `line` of a record; raises msgspec.MsgspecError for what is no whole record."""
    return _numbered.decode(raw).line


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a row: the first choice's text beside what is needed to judge it."""
    response = record["response"]
    body = response["body"]
    usage = body.get("usage") or {}
    choice = (body.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    error = record["error"]
    return {
        "line": record["line"],
        "custom_id": record["custom_id"],
        "text": message.get("content") if message else choice.get("text"),
        "finish_reason": choice.get("finish_reason"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "status_code": response["status_code"],
        "error": None if error is None else error.get("message"),
        "response": _encoder.encode(body).decode(),
    }
