"""POST /v1/completions. Knows the JSON of completions; tokens and work are the engine's."""

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from jaxinfer.core.outputs import CompletionOutput, Logprob, RequestOutput
from jaxinfer.engine.inputs import ValidatedPrompt
from jaxinfer.errors import RequestError
from jaxinfer.server import sse
from jaxinfer.server.answer import REQUEST_ID, Answer, Begun, begin_answer, respond
from jaxinfer.server.body import parse, read_json, show
from jaxinfer.server.generation import Job, PromptOutput, check_count, prepare
from jaxinfer.server.logprobs import TextOffsets
from jaxinfer.server.protocol import CompletionRequest, check_common, refuse_unsupported
from jaxinfer.server.sampling import Sampling, completion_sampling
from jaxinfer.server.shapes import check_choice
from jaxinfer.server.state import STATE, ServerState, Serving

MAX_PROMPTS = 1024

_OBJECT = "text_completion"


async def completions(request: web.Request) -> web.StreamResponse:
    """Handler."""
    raw = await read_json(request)
    begun = await begin_completion(request.app[STATE], raw, request_id=request[REQUEST_ID])
    return await respond(request, begun)


async def begin_completion(state: ServerState, raw: dict[str, Any], *, request_id: str) -> Begun:
    """Everything up to the first token. Raises what is wrong with the request or the server."""
    parsed = parse(raw, CompletionRequest)
    body = parsed.value
    serving = state.serving
    model = serving.check_model(body.model)
    refuse_unsupported(body)
    check_common(body)
    sampling = completion_sampling(
        body, serving.sampling_defaults, max_tokens_given="max_tokens" in parsed.raw
    )
    prompts = await _prepare_all(serving, body, sampling)
    answer = begin_answer(
        serving,
        body,
        model=model,
        prefix="cmpl",
        request_id=request_id,
        ignored=parsed.unknown,
    )
    job = Job(
        request_id=answer.id,
        prompts=prompts,
        n=sampling.params.n,
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
    )
    shown = _Completions(
        answer, job, serving, echo=bool(body.echo), prompt_logprobs=body.prompt_logprobs is not None
    )
    return Begun(answer, job, shown, serving, bool(body.stream))


def _split(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One prompt each. Raises RequestError for mixtures, none, or too many."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt must not be empty.", param="prompt")
    first = type(prompt[0])
    for index, item in enumerate(prompt):
        if type(item) is not first:
            raise RequestError(
                "prompt must be a text, token ids, a list of texts or a list of lists of token "
                f"ids, not a mixture: prompt[{index}] is {show(item)}.",
                param="prompt",
            )
    if first is int:
        return [[item for item in prompt if isinstance(item, int)]]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"prompt takes at most {MAX_PROMPTS} prompts, got {len(prompt)}.", param="prompt"
        )
    return [item for item in prompt if not isinstance(item, int)]


async def _prepare_all(
    serving: Serving, body: CompletionRequest, sampling: Sampling
) -> list[ValidatedPrompt]:
    special = body.add_special_tokens is not False
    prompts = _split(body.prompt)
    check_count(serving, num_prompts=len(prompts), n=sampling.params.n)
    return [
        await prepare(serving, prompt, sampling, add_special_tokens=special, param="prompt")
        for prompt in prompts
    ]


class _Completions:
    """The answer's JSON, whole or as frames. Choice `n * p + i` is completion i of prompt p."""

    def __init__(
        self, answer: Answer, job: Job, serving: Serving, *, echo: bool, prompt_logprobs: bool
    ) -> None:
        self._answer = answer
        self._prompts = job.prompts
        self._n = job.n
        self._serving = serving
        self._echo = echo
        self._prompt_logprobs = prompt_logprobs
        self._wants_logprobs = job.prompts[0].params.logprobs is not None
        self._is_plain = not (
            self._wants_logprobs or answer.return_token_ids or answer.usage_in_each_chunk
        )
        num_choices = len(job.prompts) * job.n
        self._texts: dict[int, sse.TextFrames] = {}
        self._offsets: dict[int, TextOffsets] = {}
        self._is_begun = [False] * num_choices
        self._prompt_entries: dict[int, list[dict[int, Logprob] | None]] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The `text_completion` object."""
        choices = [
            self._choice(index, output, choice)
            for index, output in enumerate(outputs)
            for choice in sorted(output.outputs, key=lambda choice: choice.index)
        ]
        return {**self._answer.head(_OBJECT), "choices": choices, "usage": self._answer.usage()}

    def _choice(
        self, prompt_index: int, output: RequestOutput, choice: CompletionOutput
    ) -> dict[str, Any]:
        self._keep_prompt_logprobs(prompt_index, output)
        shown = self._full(prompt_index, choice)
        if self._prompt_logprobs:
            entries = self._prompt_entries.get(prompt_index, [])
            shown["prompt_logprobs"] = self._answer.logprobs.prompt(entries)
        return shown

    def begin(self) -> bytes:
        return b""

    def frames(self, item: PromptOutput) -> bytes:
        prompt_index, output = item.prompt_index, item.output
        self._keep_prompt_logprobs(prompt_index, output)
        return b"".join([self._frame(prompt_index, choice) for choice in output.outputs])

    def end(self) -> bytes:
        return self._answer.usage_frame(_OBJECT) + sse.DONE

    def _keep_prompt_logprobs(self, prompt_index: int, output: RequestOutput) -> None:
        if output.prompt_logprobs is not None:
            self._prompt_entries[prompt_index] = output.prompt_logprobs

    def _frame(self, prompt_index: int, choice: CompletionOutput) -> bytes:
        index = prompt_index * self._n + choice.index
        needs_begin = not self._is_begun[index] and self._echo
        if self._is_plain and not needs_begin and choice.finish_reason is None:
            return self._text_frame(index, choice.text) if choice.text else b""
        return sse.frame(self._chunk(self._full(prompt_index, choice)))

    def _text_frame(self, index: int, text: str) -> bytes:
        frames = self._texts.get(index)
        if frames is None:
            example = self._chunk(self._part(index, sse.TextFrames.PLACEHOLDER))
            frames = self._texts[index] = sse.TextFrames(example)
        return frames.frame(text)

    def _full(self, prompt_index: int, choice: CompletionOutput) -> dict[str, Any]:
        """A choice with all that was asked for: the first of its kind carries the prompt."""
        check_choice(choice)
        index = prompt_index * self._n + choice.index
        is_first = not self._is_begun[index]
        self._is_begun[index] = True
        prompt = self._prompts[prompt_index]
        echo = is_first and self._echo
        shown = self._part(index, (self._prompt_text(prompt) if echo else "") + choice.text)
        if self._wants_logprobs:
            shown["logprobs"] = self._logprobs(index, prompt_index, choice, echo=echo)
        shown["finish_reason"] = choice.finish_reason
        if choice.finish_reason is not None:
            shown["stop_reason"] = choice.stop_reason
        if self._answer.return_token_ids:
            shown["token_ids"] = choice.token_ids
            if is_first:
                shown["prompt_token_ids"] = prompt.prompt_token_ids
        return shown

    def _logprobs(
        self, index: int, prompt_index: int, choice: CompletionOutput, *, echo: bool
    ) -> dict[str, Any]:
        prompt = self._prompts[prompt_index]
        offsets = self._offsets.get(index)
        if offsets is None:
            offsets = self._offsets[index] = TextOffsets(
                self._serving.tokenizer, prompt.prompt_token_ids, prompt.params
            )
        token_ids = list(choice.token_ids)
        entries: list[Mapping[int, Logprob] | None] = list(choice.logprobs or [])
        begins: list[int] = []
        if echo:
            prompt_ids = prompt.prompt_token_ids
            known = self._prompt_entries.get(prompt_index) or [None] * len(prompt_ids)
            begins = offsets.of_prompt(self._prompt_text(prompt))
            token_ids, entries = [*prompt_ids, *token_ids], [*known, *entries]
        begins += offsets.of_output(choice.token_ids)
        return self._answer.logprobs.completion(token_ids, entries, begins)

    def _prompt_text(self, prompt: ValidatedPrompt) -> str:
        is_whole = prompt.params.truncate_prompt_tokens is None
        if prompt.text is not None and is_whole:
            return prompt.text
        return self._serving.tokenizer.decode(prompt.prompt_token_ids, skip_special_tokens=False)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._answer.chunk(_OBJECT, (choice,))

    @staticmethod
    def _part(index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}
