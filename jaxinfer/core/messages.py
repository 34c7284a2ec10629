"""The wire between an engine client and an EngineCore: small typed structs, msgpack, no pickle.

Fields are only ever appended; `WIRE_VERSION` changes when one changes meaning, and the two sides
refuse each other when it differs. Knows nothing of sockets.
"""

import msgspec

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import TokenLogprobs

WIRE_VERSION = 1


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="add"):
    """Client -> core: serve this sequence. n > 1 was fanned out; text was tokenized."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_time_s: float  # time.monotonic() of the client's host
    priority: int = 0
    cache_salt: str | None = None


class AbortRequests(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="abort"):
    """Client -> core: stop these and free their pages. Unknown ids are ignored."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="shutdown"):
    """Client -> core: end. Running requests are aborted."""


class ResetPrefixCache(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="reset"):
    """Client -> core: forget cached prefixes."""


ClientMessage = AddRequest | AbortRequests | Shutdown | ResetPrefixCache


class Hello(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="hello"):
    """Core -> client, first message of all."""

    wire_version: int
    pid: int


class Progress(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="progress"):
    """Core -> client, while starting: the phase it is in ("load weights", "compile", ...)."""

    phase: str
    done: int = 0
    total: int = 0
    elapsed_s: float = 0.0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a client must know of the engine it talks to."""

    model: str  # as the user named it
    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: list[int]
    max_logprobs: int
    enable_prefix_caching: bool
    scheduling_policy: str
    dtype: str
    device: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="ready"):
    """Core -> client: every shape is compiled; requests will be served."""

    info: EngineInfo


class SequenceUpdate(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """News of one sequence."""

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one per new token
    prompt_logprobs: list[TokenLogprobs] | None = None  # the next prompt positions, from 1 on
    finish_reason: str | None = None  # a core.request.FinishReason value
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    queue_time_s: float | None = None  # arrival to first scheduled; set in the first update
    error: str | None = None  # with finish_reason "error"


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A snapshot of the engine; totals count since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # fraction of pages in use by running requests, 0..1
    num_steps_total: int = 0
    prefix_queries_total: int = 0  # tokens looked up
    prefix_hits_total: int = 0  # tokens found
    num_preemptions_total: int = 0
    num_compiles_after_ready: int = 0
    num_failed_steps_total: int = 0  # steps that broke; their requests were run again
    num_restarts_total: int = 0  # cores started in place of one that was lost


class StepUpdate(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="update"):
    """Core -> client, after each step; without sequences it still brings the figures."""

    sequences: list[SequenceUpdate]
    stats: EngineStats
    num_tokens: int = 0  # that the step computed, prompts' and generated ones; 0: no step has ended


class Rejected(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="rejected"):
    """Core -> client: a request was not taken. `kind` is "queue_full" or "invalid"."""

    request_id: str
    kind: str
    message: str
    param: str | None = None


class Failed(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="failed"):
    """Core -> client, last message: the core cannot go on. `kind` is the exception's class name."""

    kind: str
    message: str


CoreMessage = Hello | Progress | Ready | StepUpdate | Rejected | Failed
