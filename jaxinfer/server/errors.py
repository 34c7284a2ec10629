"""The one error envelope of the HTTP interface, and which status each failure gets.

    {"error": {"message": str, "type": str, "param": str | null, "code": int}}

`code` is the HTTP status, `type` its name (vLLM's names where it has one):

    400 BadRequestError            401 AuthenticationError        404 NotFoundError
    405 MethodNotAllowedError      408 RequestTimeoutError        413 PayloadTooLargeError
    415 UnsupportedMediaTypeError  429 TooManyRequestsError       500 InternalServerError
    503 ServiceUnavailableError

Knows jaxinfer's exceptions and HTTP numbers; nothing of routes, engines or sockets.
"""

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from jaxinfer.errors import (
    EngineDeadError,
    JaxInferError,
    ModelNotFoundError,
    QueueFullError,
    RequestError,
)

_TYPE_NAMES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "TooManyRequestsError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_RETRY_WHEN_UNAVAILABLE_S = 5


class ApiError(JaxInferError):
    """A failure with the status and headers that the client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type_name(self) -> str:
        name = _TYPE_NAMES.get(self.status)
        return name or HTTPStatus(self.status).phrase.replace(" ", "") + "Error"

    def envelope(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": self.type_name,
                "param": self.param,
                "code": self.status,
            }
        }

    def response(self) -> web.Response:
        return web.Response(
            body=msgspec.json.encode(self.envelope()),
            status=self.status,
            headers=self.headers,
            content_type="application/json",
        )


def unavailable(message: str) -> ApiError:
    """503 that asks the client to come back."""
    headers = {"Retry-After": str(_RETRY_WHEN_UNAVAILABLE_S)}
    return ApiError(503, message, headers=headers)


def api_error(error: JaxInferError) -> ApiError:
    """The HTTP form of an exception that jaxinfer raised on purpose."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.param)
        case ModelNotFoundError():
            return ApiError(404, str(error), param="model")
        case QueueFullError():
            seconds = max(1, math.ceil(error.retry_after_s))
            return ApiError(429, str(error), headers={"Retry-After": str(seconds)})
        case EngineDeadError():
            return unavailable(str(error) or "The engine is not running.")
    return ApiError(500, str(error))


def http_error(error: web.HTTPException, *, method: str, path: str) -> ApiError:
    """The envelope for what aiohttp itself raises: unknown routes, wrong methods, large bodies."""
    headers = {name: value for name, value in error.headers.items() if name == "Allow"}
    message = {
        404: f"There is no route {path}.",
        405: f"{path} does not take {method}; it takes {headers.get('Allow', 'other methods')}.",
    }.get(error.status, error.reason)
    return ApiError(error.status, message, headers=headers)
