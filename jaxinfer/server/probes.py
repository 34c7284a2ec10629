"""Routes that say how the server is: health, readiness, metrics, version, models. No generation."""

from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from jaxinfer import __version__
from jaxinfer.server.errors import ApiError, unavailable
from jaxinfer.server.shapes import model_card
from jaxinfer.server.state import STATE


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def health(request: web.Request) -> web.Response:
    """Handler: 200 while the engine serves or starts for the first time; 503 when it is gone,
    stalled or being restarted."""
    problem = request.app[STATE].not_alive()
    if problem is not None:
        raise unavailable(f"Not healthy: {problem}.")
    return _json({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Handler: 200 when a request would be served at once, every shape compiled."""
    state = request.app[STATE]
    problem = state.not_ready()
    if problem is not None:
        raise unavailable(f"Not ready: {problem}.")
    return _json({"status": "ready"})


async def metrics(request: web.Request) -> web.Response:
    """Handler: Prometheus text."""
    body = request.app[STATE].metrics.exposition()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def version(request: web.Request) -> web.Response:  # noqa: ARG001 - a handler
    """Handler."""
    return _json({"version": __version__})


def _cards(request: web.Request) -> list[dict[str, Any]]:
    serving = request.app[STATE].serving
    return [
        model_card(
            name,
            root=serving.info.model,
            created_s=serving.created_s,
            max_model_len=serving.info.max_model_len,
        )
        for name in serving.model_names
    ]


async def list_models(request: web.Request) -> web.Response:
    """Handler."""
    return _json({"object": "list", "data": _cards(request)})


async def get_model(request: web.Request) -> web.Response:
    """Handler. A name may hold slashes, as Hub ids do."""
    name = request.match_info["id"]
    for card in _cards(request):
        if card["id"] == name:
            return _json(card)
    raise ApiError(404, f"The model `{name}` does not exist.", param="model")
