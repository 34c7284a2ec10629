"""LLM: batches of prompts in, lists of outputs out, in the caller's own process and thread.

Joins tokenizer, in-process client and output processor. Importing this module imports no JAX;
making an LLM does.
"""

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from types import TracebackType
from typing import Any, cast

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.core.messages import EngineInfo, EngineStats, Rejected, StepUpdate
from jaxinfer.core.outputs import RequestOutput
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.admission import check_priority
from jaxinfer.engine.inproc import InProcessClient
from jaxinfer.engine.inputs import InputProcessor, Prompt, ValidatedPrompt
from jaxinfer.engine.interrupts import Interrupts
from jaxinfer.engine.model_source import default_sampling_params, load_model_tokenizer
from jaxinfer.engine.output_processor import OutputProcessor
from jaxinfer.engine.progress import batch_progress, start_progress
from jaxinfer.engine.request_state import RequestState
from jaxinfer.errors import EngineDeadError, QueueFullError, RequestError
from jaxinfer.tokenizer.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model in this process.

        with LLM("path/or/name", max_model_len=2048) as llm:
            outputs = llm.generate(["Hello"], SamplingParams(max_tokens=20))

    `engine_args` are the fields of config/schema.py under the flags' names; an unknown one is a
    ConfigError that names the nearest. Loading compiles everything: no request waits for it.
    """

    def __init__(
        self, model: str | None = None, *, tokenizer: str | None = None, **engine_args: Any
    ) -> None:
        given = {"model": model, "tokenizer": tokenizer}
        engine_args |= {name: value for name, value in given.items() if value is not None}
        config = engine_config_from_kwargs(**engine_args)
        with start_progress() as on_progress:
            loaded = load_model_tokenizer(config, on_progress)
            client = InProcessClient(config, on_progress=on_progress)
        self._set_up(
            client,
            loaded.tokenizer,
            default_params=default_sampling_params(loaded.tokenizer, config.model),
            seed=config.model.seed,
        )

    @classmethod
    def from_parts(
        cls,
        client: InProcessClient,
        tokenizer: Tokenizer,
        *,
        default_params: SamplingParams | None = None,
        seed: int = 0,
    ) -> "LLM":
        """An LLM over a client that is there; `seed` seeds the requests that give none."""
        self = cls.__new__(cls)
        self._set_up(
            client, tokenizer, default_params=default_params or SamplingParams(), seed=seed
        )
        return self

    def _set_up(
        self,
        client: InProcessClient,
        tokenizer: Tokenizer,
        *,
        default_params: SamplingParams,
        seed: int,
    ) -> None:
        self.stats = EngineStats()
        self._client = client
        self._tokenizer = tokenizer
        self._default_params = default_params
        self._inputs = InputProcessor(tokenizer, client.info)
        seeds = Random(seed)
        self._outputs = OutputProcessor(tokenizer, next_seed=lambda: seeds.getrandbits(63))

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none: the model's generation_config.json."""
        return self._default_params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Completes all prompts, in their order.

        A prompt is a string, {"prompt_token_ids": [...]}, or a list of token ids inside a list.
        Parameters are one for all, or one per prompt. Raises RequestError, before any work, if
        any prompt cannot be served. `use_tqdm` shows progress on a terminal.
        """
        return self._generate(
            _as_prompts(prompts),
            sampling_params,
            show_progress=use_tqdm,
            priority=priority,
            cache_salt=cache_salt,
        )

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list, through the model's chat template."""
        if messages and isinstance(messages[0], Mapping):
            conversations = [cast(Conversation, messages)]
        else:
            conversations = list(cast(Sequence[Conversation], messages))
        texts = [
            self._tokenizer.render_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=chat_template,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        # Templates write the special tokens themselves.
        return self._generate(
            texts, sampling_params, show_progress=use_tqdm, add_special_tokens=False
        )

    def reset_prefix_cache(self) -> None:
        self._client.reset_prefix_cache()

    def close(self) -> None:
        """Gives the device back. Idempotent."""
        self._client.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        show_progress: bool,
        add_special_tokens: bool = True,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        if not self._client.is_alive:
            raise EngineDeadError("The engine is closed.")
        params = self._params_for(sampling_params, len(prompts))
        priorities = _priorities_for(priority, len(prompts))
        for one in priorities:
            check_priority(one, self.info)
        validated = [
            self._inputs.validate(prompt, one, add_special_tokens=add_special_tokens)
            for prompt, one in zip(prompts, params, strict=True)
        ]
        states: list[RequestState] = []
        try:
            with (
                Interrupts() as interrupts,
                batch_progress(len(prompts), is_shown=show_progress) as advance,
            ):
                outputs: dict[int, RequestOutput] = {}
                waiting = iter(zip(validated, priorities, strict=True))
                while len(outputs) < len(validated):
                    self._fill(waiting, states, cache_salt)
                    for state in self._step():
                        outputs[id(state)] = _final(state)
                        advance()
                    interrupts.check()
        finally:
            self._abort_open(states)
        return [outputs[id(state)] for state in states]

    def _fill(
        self,
        waiting: "Iterator[tuple[ValidatedPrompt, int]]",
        states: list[RequestState],
        cache_salt: str | None,
    ) -> None:
        """Adds requests while the engine's queue is short: it is bounded, batches are not."""
        while self._outputs.num_open_sequences < 4 * self.info.max_num_seqs:
            entry = next(waiting, None)
            if entry is None:
                return
            prompt, priority = entry
            new = self._outputs.add(
                str(len(states)),
                prompt,
                output_kind="final",
                priority=priority,
                cache_salt=cache_salt,
            )
            states.append(new.state)
            for message in new.messages:
                self._client.add(message)

    def _step(self) -> Iterator[RequestState]:
        """One turn of the engine; the requests that it finished."""
        for message in self._client.step():
            if isinstance(message, StepUpdate):
                self.stats = message.stats
                processed = self._outputs.process(message)
                if processed.aborts:
                    self._client.abort(processed.aborts)
                yield from (state for state in processed.changed if state.is_finished)
            elif isinstance(message, Rejected):
                if message.kind == "queue_full":
                    raise QueueFullError(message.message)
                raise RequestError(message.message, param=message.param)

    def _abort_open(self, states: list[RequestState]) -> None:
        """After an error or Ctrl-C: the engine must be free for the next call."""
        sequence_ids = [name for state in states for name in self._outputs.forget(state)]
        if self._client.is_alive:
            if sequence_ids:
                self._client.abort(sequence_ids)
            while self._client.has_work:  # the step that was dispatched last
                self._client.step()

    def _params_for(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            return [self._default_params] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise RequestError(
                f"sampling_params must be one for all or one per prompt: got {len(given)} for "
                f"{count} prompts.",
                param="sampling_params",
            )
        return list(given)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one or many; a flat list of integers is one prompt, as in vLLM."""
    if isinstance(prompts, str | Mapping):
        return [cast(Prompt, prompts)]
    if prompts and all(type(item) is int for item in prompts):
        return [cast(list[int], list(prompts))]
    return list(cast(Sequence[Prompt], prompts))


def _priorities_for(given: Sequence[int] | None, count: int) -> Sequence[int]:
    if given is None:
        return [0] * count
    if len(given) != count:
        raise RequestError(
            f"priority must be one number per prompt: got {len(given)} for {count} prompts.",
            param="priority",
        )
    return given


def _final(state: RequestState) -> RequestOutput:
    output = state.take()
    assert output is not None, "a finished request has an output"
    return output
