"""The generating routes without HTTP: a JSON body in, status and JSON body out.

For batch jobs: same checks, same answers, same errors as over HTTP, and defaults for fields that
a request leaves out. Knows routes and bodies; nothing of files or of who asks.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from jaxinfer.batch.lines import Line, Reply
from jaxinfer.config.fields import nearest
from jaxinfer.errors import ConfigError, EngineDeadError, JaxInferError, RequestError
from jaxinfer.logging import get_logger
from jaxinfer.server.answer import Begun, run_whole
from jaxinfer.server.body import parse
from jaxinfer.server.chat import begin_chat
from jaxinfer.server.completions import begin_completion
from jaxinfer.server.errors import ApiError, api_error
from jaxinfer.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerateRequest,
    check_common,
    refuse_unsupported,
)
from jaxinfer.server.sampling import chat_sampling, completion_sampling
from jaxinfer.server.shapes import request_suffix
from jaxinfer.server.state import ServerState

logger = get_logger(__name__)

CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
_STRUCTS: Mapping[str, type[GenerateRequest]] = {
    CHAT_URL: ChatCompletionRequest,
    COMPLETION_URL: CompletionRequest,
}
_OF_THE_LINE = frozenset(
    ("model", "messages", "prompt", "stream", "stream_options", "request_id", "user", "suffix")
)
_RETRY_STATUSES = (429, 503)
_RETRY_AFTER_S = 1.0  # asking costs nothing here: less than a client over HTTP should wait
_LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")


class DirectApi:
    """Answers lines with the engine of `state`; `defaults` as `check_defaults` lets them pass."""

    def __init__(self, state: ServerState, *, defaults: Mapping[str, Any]) -> None:
        self._state = state
        self._defaults = {url: _applicable(defaults, url) for url in _STRUCTS}

    async def answer(self, line: Line) -> Reply:
        """A `Handler`. Closing it early aborts the request."""
        request_id = request_suffix(None)
        is_begun = False
        try:
            begun = await self._begin(line, request_id)
            is_begun = True
            body = await run_whole(self._state, begun)
        except JaxInferError as error:
            is_lost = is_begun and isinstance(error, EngineDeadError)
            return _refused(api_error(error), request_id, lost_engine=is_lost)
        except Exception:  # noqa: BLE001 - the task's boundary: a bug must cost one line, not the job
            logger.exception("%s failed", line.where)
            return _refused(ApiError(500, "Internal error; the log has more."), request_id)
        return Reply(status=200, body=body, request_id=request_id)

    async def _begin(self, line: Line, request_id: str) -> Begun:
        begin = self._route(line.url)
        body = _with_defaults(line.body, self._defaults[line.url])
        if body.get("stream"):
            raise RequestError("stream=true has no meaning in a batch; remove it.", param="stream")
        return await begin(body, request_id, line.num_bytes)

    def _route(self, url: str) -> Callable[[dict[str, Any], str, int], Awaitable[Begun]]:
        match url:
            case "/v1/chat/completions":
                return lambda body, request_id, num_bytes: begin_chat(
                    self._state, body, request_id=request_id, num_bytes=num_bytes
                )
            case "/v1/completions":
                return lambda body, request_id, _: begin_completion(
                    self._state, body, request_id=request_id
                )
        raise ApiError(404, f"There is no route {url}. Known: {', '.join(_STRUCTS)}.", param="url")


def _refused(error: ApiError, request_id: str, *, lost_engine: bool = False) -> Reply:
    return Reply(
        status=error.status,
        body=error.envelope(),
        request_id=request_id,
        retry_after_s=_RETRY_AFTER_S if error.status in _RETRY_STATUSES else None,
        lost_engine=lost_engine,
    )


# -------------------------------------------------------------------------------- defaults


def check_defaults(defaults: Mapping[str, Any], urls: tuple[str, ...]) -> None:
    """Raises ConfigError for a default that requests to `urls` could not have.

    So a wrong default is known once, at the start, and not told off in every line.
    """
    known = {name for url in urls for name in _STRUCTS[url].__struct_fields__} - _OF_THE_LINE
    for name in defaults:
        if name in _OF_THE_LINE:
            raise ConfigError(f"sampling: {name} belongs into the lines. Remove it.")
        if name not in known:
            near = nearest(name, known)
            hint = f" Did you mean {near}?" if near else ""
            raise ConfigError(f"sampling: unknown name {name!r}.{hint}")
    for url in urls:
        try:
            _check_body(url, _applicable(defaults, url))
        except RequestError as error:
            raise ConfigError(f"sampling: {error} (for {url})") from error


def _check_body(url: str, defaults: dict[str, Any]) -> None:
    if url == CHAT_URL:
        example = {"messages": [{"role": "user", "content": ""}], **defaults}
        chat = parse(example, ChatCompletionRequest).value
        refuse_unsupported(chat)
        check_common(chat)
        chat_sampling(chat, {})
        return
    completion = parse({"prompt": "", **defaults}, CompletionRequest).value
    refuse_unsupported(completion)
    check_common(completion)
    completion_sampling(completion, {}, max_tokens_given="max_tokens" in defaults)


def _applicable(defaults: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Those that requests to `url` know."""
    fields = _STRUCTS[url].__struct_fields__
    return {name: value for name, value in defaults.items() if name in fields}


def _with_defaults(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The line's own fields win; null means "not given", and one length is as good as the other."""
    if any(body.get(name) is not None for name in _LENGTH_FIELDS):
        defaults = {name: value for name, value in defaults.items() if name not in _LENGTH_FIELDS}
    missing = {name: value for name, value in defaults.items() if body.get(name) is None}
    return {**body, **missing}
