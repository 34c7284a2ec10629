"""Stands in for the engine core: an EngineClient whose tokens are letters from a hash.

Everything above the client is the real thing: AsyncEngine, tokenizer, server. What a core can do
to a server can be asked of it: be slow, reject, break a sequence, stop stepping, die.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from jaxinfer.core.messages import (
    AddRequest,
    CoreMessage,
    EngineInfo,
    EngineStats,
    Failed,
    Rejected,
    SequenceUpdate,
    StepUpdate,
)
from jaxinfer.core.step import TokenLogprobs
from jaxinfer.errors import EngineDeadError

VOCAB_SIZE = 260  # 256 bytes and four special tokens, as the tokenizer in conftest.py
MAX_MODEL_LEN = 128
EOS = 257
LETTERS = [ord(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]


def next_token(token_ids: list[int], seed: int | None) -> int:
    return LETTERS[zlib.crc32(repr((seed, token_ids)).encode()) % len(LETTERS)]


def expected_text(prompt_ids: list[int], num_tokens: int, *, seed: int | None = None) -> str:
    """What a request alone must say."""
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        ids.append(next_token(ids, seed))
    return bytes(ids[len(prompt_ids) :]).decode()


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """The token is second most likely; letter 'z' is the most likely one, and so on down."""
    others = [other for other in reversed(LETTERS) if other != token_id]
    ranked = [others[0], token_id, *others[1:]]
    top = ranked[:num_top]
    ids = [token_id, *top]
    return TokenLogprobs(ids, [-0.5 * (ranked.index(other) + 1) for other in ids], 2)


@dataclass(eq=False)
class _Sequence:
    request: AddRequest
    output: list[int] = field(default_factory=list)
    is_started: bool = False

    def step(self, *, broken: bool) -> SequenceUpdate:
        sampling = self.request.sampling
        room = MAX_MODEL_LEN - len(self.request.prompt_token_ids)
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        new, reason, stop_reason = [], None, None
        if broken:
            reason = "error"
        elif limit > 0:
            seed = None if sampling.is_greedy else sampling.seed
            token = next_token([*self.request.prompt_token_ids, *self.output], seed)
            new = [token]
            self.output.append(token)
            if token in sampling.stop_token_ids and len(self.output) >= sampling.min_tokens:
                reason, stop_reason = "stop", token
        if reason is None and len(self.output) >= limit:
            reason = "length"
        prompt_logprobs = None
        if not self.is_started and sampling.prompt_logprobs is not None:
            prompt_logprobs = [
                logprobs_of(token, sampling.prompt_logprobs)
                for token in self.request.prompt_token_ids[1:]
            ]
        update = SequenceUpdate(
            request_id=self.request.request_id,
            new_token_ids=new,
            logprobs=(
                [logprobs_of(token, sampling.logprobs) for token in new]
                if sampling.logprobs is not None
                else None
            ),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=3 if not self.is_started else 0,
            queue_time_s=0.001 if not self.is_started else None,
            error="the logits are not finite" if broken else None,
        )
        self.is_started = True
        return update


class FakeCore:
    """An EngineClient. Attributes may be set at any time."""

    def __init__(self, *, scheduling_policy: str = "fcfs") -> None:
        self.step_s = 0.0005
        self.is_frozen = False
        self.rejects_as: str | None = None
        self.breaks_after: int | None = None  # tokens, then the sequence fails
        self.open: dict[str, _Sequence] = {}
        self.added: list[AddRequest] = []
        self.aborted: list[str] = []
        self._policy = scheduling_policy
        self._messages: asyncio.Queue[CoreMessage | None] = asyncio.Queue()
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_alive = True

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="fake",
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            num_pages=100,
            page_size=16,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            eos_token_ids=[EOS],
            max_logprobs=20,
            enable_prefix_caching=True,
            scheduling_policy=self._policy,
            dtype="float32",
            device="none",
        )

    @property
    def is_alive(self) -> bool:
        return self._is_alive

    async def start(self) -> EngineInfo:
        self._task = asyncio.create_task(self._run())
        return self.info

    async def add(self, request: AddRequest) -> None:
        if not self._is_alive:
            raise EngineDeadError("The engine is stopped.")
        self.added.append(request)
        if self.rejects_as is not None:
            self._messages.put_nowait(
                Rejected(request_id=request.request_id, kind=self.rejects_as, message="full")
            )
            return
        self.open[request.request_id] = _Sequence(request)
        self._work.set()

    async def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if self.open.pop(request_id, None) is not None:
                self.aborted.append(request_id)

    async def reset_prefix_cache(self) -> None:
        pass

    async def messages(self) -> AsyncIterator[CoreMessage]:
        while (message := await self._messages.get()) is not None:
            yield message

    async def close(self) -> None:
        self._is_alive = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._messages.put_nowait(None)

    def die(self) -> None:
        """As if the process had been killed."""
        self._is_alive = False
        self.open.clear()
        self._messages.put_nowait(Failed(kind="EngineDeadError", message="The core ended."))

    async def _run(self) -> None:
        num_steps = 0
        while True:
            if not self.open or self.is_frozen:
                self._work.clear()
                await self._work.wait()
            await asyncio.sleep(self.step_s)
            if self.is_frozen:
                continue
            updates = []
            for sequence in list(self.open.values()):
                limit = self.breaks_after
                broken = limit is not None and len(sequence.output) >= limit
                updates.append(sequence.step(broken=broken))
                if updates[-1].finish_reason is not None:
                    del self.open[sequence.request.request_id]
            num_steps += 1
            stats = EngineStats(num_running=len(self.open), num_steps_total=num_steps)
            # (A real step counts prompts too; here all but the broken ones give one token.)
            num_tokens = sum(len(update.new_token_ids) for update in updates)
            message = StepUpdate(sequences=updates, stats=stats, num_tokens=num_tokens)
            self._messages.put_nowait(message)
