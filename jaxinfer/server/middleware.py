"""What every request goes through: its id, the key, the one error form, count and log line.

Knows HTTP and errors; no route's business.
"""

import hashlib
import hmac
import time
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from jaxinfer.errors import JaxInferError
from jaxinfer.logging import get_logger
from jaxinfer.server.answer import REQUEST_ID, SUMMARY
from jaxinfer.server.errors import ApiError, api_error, http_error
from jaxinfer.server.shapes import request_suffix
from jaxinfer.server.state import ServerState

logger = get_logger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
_CLIENT_LEFT = 499  # nginx's number; seen in logs and metrics only, no client gets it
_QUIET_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics"})


def _route_of(request: web.Request) -> str:
    resource = request.match_info.route.resource
    # Unknown paths are the client's invention: they must not become label values.
    return "none" if resource is None else resource.canonical


def observe(state: ServerState) -> Middleware:
    """The outermost layer: gives the request its id, counts it, logs one line when it is over."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request_suffix(request.headers.get(REQUEST_ID_HEADER))
        request[REQUEST_ID] = request_id
        start_s = time.monotonic()
        status = _CLIENT_LEFT
        try:
            response = await handler(request)
            status = response.status
            return response
        except ConnectionError:
            # The client went away while we wrote. There is nobody left to answer.
            return web.Response(status=_CLIENT_LEFT)
        finally:
            seconds = time.monotonic() - start_s
            state.metrics.http.observe(
                handler=_route_of(request), method=request.method, status=status, seconds=seconds
            )
            if not state.config.disable_log_requests and request.path not in _QUIET_PATHS:
                summary = request.get(SUMMARY)
                logger.info(
                    "%s %s %s %d %.3fs%s",
                    request_id,
                    request.method,
                    ascii(request.path)[1:-1],
                    status,
                    seconds,
                    "" if summary is None else f" {summary}",
                )

    return middleware


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """A signal: runs when headers are about to be sent, streams included."""
    request_id = request.get(REQUEST_ID)
    if request_id is not None:
        response.headers[REQUEST_ID_HEADER] = request_id


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every failure into the envelope."""
    try:
        return await handler(request)
    except JaxInferError as error:
        return api_error(error).response()
    except web.HTTPException as error:
        return http_error(error, method=request.method, path=request.path).response()
    except ConnectionError:
        raise
    except Exception:
        # The process boundary: the client gets no internals, the log gets all of them.
        logger.exception("request %s failed", request[REQUEST_ID])
        return ApiError(500, f"Internal error; request id {request[REQUEST_ID]}.").response()


def authenticate(keys: Sequence[str], *, open_paths: frozenset[str]) -> Middleware:
    """401 without one of `keys`, on every path (known or not) but `open_paths`."""
    digests = [_digest(key) for key in keys]

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in open_paths and not _is_known(request, digests):
            raise ApiError(
                401,
                "Missing or wrong API key: send the header `Authorization: Bearer KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await handler(request)

    return middleware


def _is_known(request: web.Request, digests: Sequence[bytes]) -> bool:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    digest = _digest(key.strip())
    # All keys are compared in constant time, whichever matches.
    matches = [hmac.compare_digest(digest, known) for known in digests]
    return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
