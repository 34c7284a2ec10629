"""The aiohttp application: routes and the layers around them. Knows no engine's insides."""

from collections.abc import Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from jaxinfer.config import env
from jaxinfer.config.schema import ServerConfig
from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.server import middleware, probes
from jaxinfer.server.chat import chat_completions
from jaxinfer.server.completions import completions
from jaxinfer.server.openapi import openapi
from jaxinfer.server.state import STATE, ServerState
from jaxinfer.server.tokenize import detokenize, tokenize

_OPEN_PATHS = ("/health", "/ready")


def create_app(
    engine: AsyncEngine,
    config: ServerConfig,
    *,
    sampling_defaults: Mapping[str, Any] | None = None,
) -> web.Application:
    """An application around an engine that has started.

    `sampling_defaults` are used where a request says nothing (default: the model's own).
    """
    state = ServerState(config)
    state.attach(engine, sampling_defaults=sampling_defaults)
    return create_app_around(state)


def create_app_around(state: ServerState) -> web.Application:
    """An application that answers before it has an engine (`ServerState.attach` gives it one)."""
    config = state.config
    keys = [*config.api_key, *filter(None, [env.api_key()])]
    prefixes = dict.fromkeys(("", config.root_path.rstrip("/")))
    layers: list[Middleware] = [
        state.connections.middleware(),
        middleware.observe(state),
        middleware.errors,
    ]
    if keys:
        open_paths = frozenset(prefix + path for prefix in prefixes for path in _OPEN_PATHS)
        layers.append(middleware.authenticate(keys, open_paths=open_paths))
    app = web.Application(middlewares=layers, client_max_size=config.max_body_bytes)
    app[STATE] = state
    app.on_response_prepare.append(middleware.add_request_id)
    for prefix in prefixes:
        app.add_routes(_routes(prefix))
    return app


def make_runner(app: web.Application, *, shutdown_timeout_s: float = 2.0) -> web.AppRunner:
    """Handlers are cancelled when their client goes away: that is what aborts its requests."""
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=shutdown_timeout_s,
    )


def _routes(prefix: str) -> list[web.RouteDef]:
    return [
        web.get(f"{prefix}/v1/models", probes.list_models),
        web.get(prefix + "/v1/models/{id:.+}", probes.get_model),
        web.post(f"{prefix}/v1/completions", completions),
        web.post(f"{prefix}/v1/chat/completions", chat_completions),
        web.post(f"{prefix}/tokenize", tokenize),
        web.post(f"{prefix}/detokenize", detokenize),
        web.get(f"{prefix}/health", probes.health),
        web.get(f"{prefix}/ready", probes.ready),
        web.get(f"{prefix}/ping", probes.health),
        web.post(f"{prefix}/ping", probes.health),
        web.get(f"{prefix}/metrics", probes.metrics),
        web.get(f"{prefix}/version", probes.version),
        web.get(f"{prefix}/openapi.json", openapi),
    ]
