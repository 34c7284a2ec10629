"""What every generated answer has: id, model, usage, headers. Knows JSON heads, not choices."""

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec
from aiohttp import web

from jaxinfer.core.outputs import RequestOutput
from jaxinfer.server import generation, shapes, sse
from jaxinfer.server.body import header_names
from jaxinfer.server.errors import ApiError
from jaxinfer.server.generation import Job, Summary
from jaxinfer.server.logprobs import LogprobFormatter
from jaxinfer.server.protocol import GenerateRequest
from jaxinfer.server.state import STATE, ServerState, Serving

IGNORED_HEADER = "x-jaxinfer-ignored"
SUMMARY = web.RequestKey("SUMMARY", Summary)  # for the log line
REQUEST_ID = web.RequestKey("REQUEST_ID", str)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one request, without its choices."""

    id: str
    model: str
    created_s: int
    fingerprint: str
    summary: Summary
    logprobs: LogprobFormatter
    return_token_ids: bool
    include_usage: bool
    usage_in_each_chunk: bool
    headers: dict[str, str]

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def usage(self) -> dict[str, Any]:
        summary = self.summary
        return shapes.usage(
            summary.num_prompt_tokens, summary.num_output_tokens, summary.num_cached_tokens
        )

    def chunk(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A frame's JSON. `usage` is null in all but the last where the client asked for it."""
        chunk = {**self.head(kind), "choices": choices}
        if self.usage_in_each_chunk:
            chunk["usage"] = self.usage()
        elif self.include_usage:
            chunk["usage"] = None
        return chunk

    def usage_frame(self, kind: str) -> bytes:
        """The frame after the last choice; empty unless asked for."""
        if not self.include_usage:
            return b""
        return sse.frame({**self.head(kind), "choices": [], "usage": self.usage()})

    def json(self, body: dict[str, Any]) -> web.Response:
        return _json(body, self.headers)


def json_response(body: dict[str, Any], *, ignored: list[str]) -> web.Response:
    """An answer that names the fields without effect in a header."""
    return _json(body, ignored_header(ignored))


def ignored_header(names: list[str]) -> dict[str, str]:
    return {IGNORED_HEADER: header_names(names)} if names else {}


def _json(body: dict[str, Any], headers: dict[str, str]) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), headers=headers, content_type="application/json"
    )


class Shown(sse.Frames, Protocol):
    """The JSON of a route's answer, whole or as frames."""

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """`outputs` are the finished ones of each prompt. Raises ApiError for a failed one."""
        ...


class Begun(NamedTuple):
    """A request that was checked and has not run yet."""

    answer: Answer
    job: Job
    shown: Shown
    serving: Serving
    is_stream: bool


def begin_answer(
    serving: Serving,
    body: GenerateRequest,
    *,
    model: str,
    prefix: str,
    request_id: str,
    ignored: list[str],
) -> Answer:
    """`ignored` are the names of fields without effect; the body's own request id wins."""
    suffix = shapes.request_suffix(body.request_id) if body.request_id else request_id
    options = body.stream_options
    return Answer(
        id=f"{prefix}-{suffix}",
        model=model,
        created_s=int(time.time()),
        fingerprint=serving.fingerprint,
        summary=Summary(),
        logprobs=LogprobFormatter(
            serving.tokenizer, as_token_ids=bool(body.return_tokens_as_token_ids)
        ),
        return_token_ids=bool(body.return_token_ids),
        include_usage=options is not None and bool(options.include_usage),
        usage_in_each_chunk=options is not None and bool(options.continuous_usage_stats),
        headers=ignored_header(ignored),
    )


async def respond(request: web.Request, begun: Begun) -> web.StreamResponse:
    """Runs the request and answers it over HTTP, in the form that it asked for."""
    state, answer = request.app[STATE], begun.answer
    request[SUMMARY] = answer.summary
    if begun.is_stream:
        wire = sse.Wire(request, begun.shown, answer.headers)
        outputs = generation.generate(
            state, begun.serving, begun.job, answer.summary, "delta", tap=wire
        )
        return await wire.send(outputs)
    return answer.json(await run_whole(state, begun))


async def run_whole(state: ServerState, begun: Begun) -> dict[str, Any]:
    """Runs the request to its end; the body of the answer."""
    outputs = await _run_final(state, begun.serving, begun.job, begun.answer.summary)
    return begun.shown.whole(outputs)


async def _run_final(
    state: ServerState, serving: Serving, job: Job, summary: Summary
) -> list[RequestOutput]:
    """The finished output of each prompt, in order."""
    results: dict[int, RequestOutput] = {}
    outputs = generation.generate(state, serving, job, summary, "final")
    async with aclosing(outputs):
        async for item in outputs:
            results[item.prompt_index] = item.output
    if len(results) != len(job.prompts):
        raise ApiError(500, "The engine ended the request without a result.")
    return [results[index] for index in range(len(job.prompts))]
