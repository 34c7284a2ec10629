"""POST /v1/chat/completions. Knows chat's JSON; rendering is the tokenizer's, work the engine's."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from jaxinfer.core.outputs import CompletionOutput, RequestOutput
from jaxinfer.server import messages, sse
from jaxinfer.server.answer import REQUEST_ID, Answer, Begun, begin_answer, respond
from jaxinfer.server.body import parse, read_json
from jaxinfer.server.generation import Job, PromptOutput, check_count, prepare
from jaxinfer.server.protocol import ChatCompletionRequest, check_common, refuse_unsupported
from jaxinfer.server.sampling import chat_sampling
from jaxinfer.server.shapes import check_choice
from jaxinfer.server.state import STATE, ServerState


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Handler."""
    raw = await read_json(request)
    begun = await begin_chat(
        request.app[STATE],
        raw,
        request_id=request[REQUEST_ID],
        num_bytes=request.content_length,
    )
    return await respond(request, begun)


async def begin_chat(
    state: ServerState, raw: dict[str, Any], *, request_id: str, num_bytes: int | None
) -> Begun:
    """Everything up to the first token. Raises what is wrong with the request or the server.

    `num_bytes` is the size of the request: a long one is rendered off the event loop.
    """
    parsed = parse(raw, ChatCompletionRequest)
    body = parsed.value
    serving = state.serving
    model = serving.check_model(body.model)
    refuse_unsupported(body)
    check_common(body)
    sampling = chat_sampling(body, serving.sampling_defaults)
    check_count(serving, num_prompts=1, n=sampling.params.n)
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    text = await messages.render(
        serving,
        body,
        parsed.raw,
        num_bytes=num_bytes,
        documents=body.documents,
        template_kwargs=kwargs,
    )
    prompt = await prepare(
        serving,
        text,
        sampling,
        # Templates write the special tokens themselves.
        add_special_tokens=bool(body.add_special_tokens),
        param="messages",
    )
    ignored = list(parsed.unknown)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        ignored.append("max_tokens")
    answer = begin_answer(
        serving,
        body,
        model=model,
        prefix="chatcmpl",
        request_id=request_id,
        ignored=ignored,
    )
    job = Job(
        request_id=answer.id,
        prompts=[prompt],
        n=prompt.params.n,
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
    )
    chat = _Chat(
        answer,
        job,
        role=state.config.response_role,
        echo=messages.last_text(body.messages, state.config.response_role) if body.echo else "",
        num_top=body.top_logprobs or 0,
    )
    return Begun(answer, job, chat, serving, bool(body.stream))


class _Chat:
    """The answer's JSON, whole or as frames."""

    def __init__(self, answer: Answer, job: Job, *, role: str, echo: str, num_top: int) -> None:
        self._answer = answer
        self._prompt = job.prompts[0]
        self._n = job.n
        self._role = role
        self._echo = echo
        self._num_top = num_top
        self._wants_logprobs = job.prompts[0].params.logprobs is not None
        self._is_plain = not (
            self._wants_logprobs or answer.return_token_ids or answer.usage_in_each_chunk
        )
        self._texts: list[sse.TextFrames] = []

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The `chat.completion` object."""
        [output] = outputs
        answer = self._answer
        choices = sorted(output.outputs, key=lambda choice: choice.index)
        body = {
            **answer.head("chat.completion"),
            "choices": [self._choice(choice) for choice in choices],
            "usage": answer.usage(),
        }
        if output.prompt_logprobs is not None:
            body["prompt_logprobs"] = answer.logprobs.prompt(output.prompt_logprobs)
        if answer.return_token_ids:
            body["prompt_token_ids"] = self._prompt.prompt_token_ids
        return body

    def _choice(self, choice: CompletionOutput) -> dict[str, Any]:
        check_choice(choice)
        shown = {
            "index": choice.index,
            "message": {
                "role": self._role,
                "content": self._echo + choice.text,
                "refusal": None,
                "annotations": None,
            },
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._answer.return_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown

    def _logprobs(self, choice: CompletionOutput) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return self._answer.logprobs.chat(choice.logprobs or [], self._num_top)

    def begin(self) -> bytes:
        example = {"content": sse.TextFrames.PLACEHOLDER}
        self._texts = [
            sse.TextFrames(self._chunk(self._delta_choice(index, example)))
            for index in range(self._n)
        ]
        delta = {"role": self._role, "content": ""}
        first = [self._chunk(self._delta_choice(index, delta)) for index in range(self._n)]
        if self._answer.return_token_ids:
            first[0]["prompt_token_ids"] = self._prompt.prompt_token_ids
        frames = [sse.frame(chunk) for chunk in first]
        if self._echo:
            frames += [texts.frame(self._echo) for texts in self._texts]
        return b"".join(frames)

    def frames(self, item: PromptOutput) -> bytes:
        return b"".join([self._frame(choice) for choice in item.output.outputs])

    def _frame(self, choice: CompletionOutput) -> bytes:
        if self._is_plain and choice.finish_reason is None:
            return self._texts[choice.index].frame(choice.text) if choice.text else b""
        check_choice(choice)
        shown = self._delta_choice(choice.index, {"content": choice.text} if choice.text else {})
        shown["logprobs"] = self._logprobs(choice) if choice.logprobs else None
        shown["finish_reason"] = choice.finish_reason
        if choice.finish_reason is not None:
            shown["stop_reason"] = choice.stop_reason
        if self._answer.return_token_ids:
            shown["token_ids"] = choice.token_ids
        return sse.frame(self._chunk(shown))

    def end(self) -> bytes:
        return self._answer.usage_frame("chat.completion.chunk") + sse.DONE

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return self._answer.chunk("chat.completion.chunk", choices)

    @staticmethod
    def _delta_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
