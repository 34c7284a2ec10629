"""GET /openapi.json: what the routes take, generated from the structs that read them.

Answers are described in words only: nothing here can drift from what is accepted.
"""

from functools import cache
from typing import Any

import msgspec
from aiohttp import web

from jaxinfer import __version__
from jaxinfer.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_BODIES = {
    "/v1/completions": (CompletionRequest, "Complete a prompt", True),
    "/v1/chat/completions": (ChatCompletionRequest, "Answer a conversation", True),
    "/tokenize": (TokenizeRequest, "Token ids of a text", False),
    "/detokenize": (DetokenizeRequest, "Text of token ids", False),
}
_READS = {
    "/v1/models": "The models served",
    "/v1/models/{id}": "One model",
    "/health": "200 unless the engine is gone, stalled or being restarted; needs no key",
    "/ready": "200 when requests are served at once; needs no key",
    "/metrics": "Prometheus metrics",
    "/version": "The version of jaxinfer",
}


async def openapi(request: web.Request) -> web.Response:  # noqa: ARG001 - a handler
    """Handler."""
    return web.Response(body=_document(), content_type="application/json")


@cache
def _document() -> bytes:
    structs = [struct for struct, _, _ in _BODIES.values()]
    schemas, components = msgspec.json.schema_components(
        structs, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {path: {"get": _operation(text)} for path, text in _READS.items()}
    for (path, (_, text, streams)), schema in zip(_BODIES.items(), schemas, strict=True):
        operation = _operation(text, streams=streams)
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
        paths[path] = {"post": operation}
    paths["/v1/models/{id}"]["get"]["parameters"] = [
        {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    components["Error"] = _ERROR
    document = {
        "openapi": "3.1.0",
        "info": {"title": "jaxinfer", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
    return msgspec.json.encode(document)


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}


def _operation(summary: str, *, streams: bool = False) -> dict[str, Any]:
    kinds = ["application/json"] + (["text/event-stream"] if streams else [])
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "Done.", "content": {kind: {} for kind in kinds}},
            "default": {"description": "Any failure.", "content": error},
        },
    }
