"""What is asked of the planner and what it answers, as plain data that goes through a pipe as JSON.

Imports no JAX: the command builds a request and prints an answer, a child process does the work.
Bytes are those of one device; seconds stand as `_s`.
"""

import msgspec

from jaxinfer.config.schema import EngineConfig


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One question. `engine` is as the user gave it, nothing of it resolved."""

    config_path: str  # a config.json or a .gguf file
    engine: EngineConfig
    topology: str
    sweep: bool  # also compare the ways to share the machine
    compile: bool  # False: the arithmetic only
    price_per_hour: float | None  # of the whole topology
    input_len: int  # of the requests that costs are given for
    output_len: int


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Programs to compile into `directory`."""

    config_path: str
    engine: EngineConfig
    topology: str
    directory: str


class MemoryTable(msgspec.Struct, frozen=True, kw_only=True):
    """Of one device."""

    device_bytes: int
    usable_bytes: int  # device_bytes * --gpu-memory-utilization
    weight_bytes: int
    state_bytes: int
    step_bytes: int  # kept free for the largest step's temporaries
    page_bytes: int  # one page in all layers
    num_pages: int
    page_size: int
    kv_reason: str

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.state_bytes + self.step_bytes + self.kv_bytes


class Concurrency(msgspec.Struct, frozen=True, kw_only=True):
    """Sequences of a length that the pages hold at once."""

    num_tokens: int
    num_seqs: float


class CollectiveRow(msgspec.Struct, frozen=True, kw_only=True):
    """Equal collectives of a program, taken together."""

    kind: str
    count: int
    num_bytes: int  # of all of them: their results on one device
    always: bool  # False: only in steps that want it (in a branch or a loop)


class ProgramRow(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled step."""

    name: str
    num_tokens: int
    num_layers_compiled: int  # fewer than the model has: the rest was added by proportion
    temp_bytes: int
    code_bytes: int
    argument_bytes: int
    alias_bytes: int
    moved_bytes: int  # without pages and what stays on the chip (traffic.py); 0: not known
    flops: float  # 0: not known
    collectives: list[CollectiveRow]
    trace_s: float
    compile_s: float


class DecodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """The roofline of decoding with a batch."""

    batch: int
    context: int
    fits: bool  # the pages hold so many sequences of that length
    step_s: float
    bound_by: str
    tokens_per_s: float
    output_tokens_per_s: float  # with the prompts' share of the time
    price_per_million: float | None  # output tokens, prompts included


class PrefillRow(msgspec.Struct, frozen=True, kw_only=True):
    """The roofline of a step full of prompt tokens."""

    num_tokens: int
    prompt: int
    step_s: float
    bound_by: str
    tokens_per_s: float
    price_per_million: float | None


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """Other settings, checked by the same code."""

    flags: str  # to put in place of what was given
    fits: bool
    why_not: str
    compiled: bool  # XLA's figures, not the estimate of a step's temporaries
    num_pages: int
    concurrency: float  # sequences of --max-model-len
    output_tokens_per_s: float | None  # roofline of the whole topology
    replicas: int


class PlanResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer."""

    model: str
    topology: str
    num_devices: int
    tensor_parallel_size: int
    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kernels: list[str]
    fits: bool
    why_not: str
    memory: MemoryTable  # also where it does not fit
    code_bytes: int | None  # all programs together, estimated from those compiled
    padding_bytes: int | None  # what the compiler adds to weights, state and pages
    needed_bytes: int | None  # with XLA's temporaries, code and padding; None: not compiled
    concurrency: list[Concurrency]
    programs: list[ProgramRow]
    decode: list[DecodeRow]
    prefill: list[PrefillRow]
    layouts: list[Alternative]  # of a sweep, the best first
    alternatives: list[Alternative]  # what would fit, where this does not
    assumptions: list[str]
    notes: list[str]
    wall_s: float


class BuildResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What was compiled, and how to use it."""

    topology: str
    directory: str
    num_programs: int
    num_bytes: int  # of all files
    serve_flags: str
    notes: list[str]
    wall_s: float


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An error that the user can repair."""

    kind: str  # name of its class in errors.py
    message: str
