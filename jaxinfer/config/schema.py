"""The configuration tree: frozen dataclasses, one field a flag. Knows no files, no JAX.

Flags (`--max-model-len`), YAML keys (`max_model_len` or `max-model-len`) and the keyword arguments
of `LLM` are all generated from these fields (config/load.py). `config/resolve.py` returns a new
tree in which no "auto" is left. Names and meanings are vLLM's where it has the same setting.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8", "fp8_e4m3"]
AttentionBackend = Literal["auto", "native", "xla", "pallas_tpu", "mosaic_gpu", "triton"]


def option(
    *,
    default: Any,
    help: str,
    aliases: tuple[str, ...] = (),
    metavar: str | None = None,
    units: bool = False,
) -> Any:
    """A field with what the command line needs to know of it.

    `units`: an integer that may be written 1k (1000), 1K (1024), 1.5m, 2G, as in vLLM.
    """
    metadata = {"help": help, "aliases": aliases, "metavar": metavar, "units": units}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is read."""

    model: str = option(
        default="smollm2-135m-instruct", help="directory, .gguf file, Hub id or catalogue name"
    )
    tokenizer: str | None = option(
        default=None, help="directory or Hub id of the tokenizer (default: the model's)"
    )
    revision: str | None = option(default=None, help="Hub revision: branch, tag or commit")
    download_dir: str | None = option(
        default=None, help="where downloads go (default: the cache directory)"
    )
    dtype: DType = option(default="auto", help="type of weights and activations")
    weight_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        default="auto",
        help="type of the weights in memory; may differ from dtype on a CPU only, whose C++ "
        "products are float32 with weights of either float32 or bfloat16",
    )
    max_model_len: int | None = option(
        default=None, help="longest prompt + output, tokens (default: the model's)", units=True
    )
    quantization: str | None = option(
        default=None, help="weight quantization scheme", aliases=("q",)
    )
    load_format: Literal["auto", "safetensors", "gguf", "orbax", "dummy"] = option(
        default="auto", help="format of the weights; dummy makes random ones on the device"
    )
    seed: int = option(default=0, help="seed of dummy weights and of requests that give none")
    generation_config: str = option(
        default="auto",
        help="auto: sampling defaults of the model; vllm: neutral ones; or a directory",
    )
    chat_template: str | None = option(
        default=None, help="file with a Jinja chat template, or the template"
    )
    trust_remote_code: bool = option(
        default=False, help="refused: jaxinfer runs no code from checkpoints"
    )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int | None = option(
        default=None, help="tokens a page of the KV cache holds (a TPU's kernels choose; else 16)"
    )
    kv_cache_dtype: KVCacheDType = option(
        default="auto",
        help="type of KV pages (auto: the model's dtype); with 8 bits each head has a scale, from "
        "the checkpoint or measured at the start. fp8 is fp8_e4m3",
    )
    gpu_memory_utilization: float = option(
        default=0.92,
        help="fraction of the device memory to use; on the CPU of the memory available",
        aliases=("memory_utilization", "device_memory_utilization"),
    )
    kv_cache_memory_bytes: int | None = option(
        default=None, help="size of the KV cache per device, bytes", units=True
    )
    num_gpu_blocks_override: int | None = option(default=None, help="exact number of KV pages")
    enable_prefix_caching: bool = option(default=True, help="reuse pages of equal prompt prefixes")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Who runs in a step."""

    max_num_seqs: int | None = option(default=None, help="most sequences in a step")
    max_num_batched_tokens: int | None = option(
        default=None, help="most tokens in a step", units=True
    )
    scheduling_policy: Literal["fcfs", "priority"] = option(
        default="fcfs", help="order of the waiting queue"
    )
    max_num_queued_reqs: int = option(
        default=4096, help="waiting requests above which new ones get 429"
    )
    long_prefill_token_threshold: int = option(
        default=0, help="most prompt tokens one request may take of a step (0: the whole budget)"
    )
    async_scheduling: bool = option(
        default=True, help="dispatch step N+1 before the result of N is read"
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many devices, and what for."""

    tensor_parallel_size: int = option(
        default=1, help="devices that share each layer", aliases=("tp",)
    )
    pipeline_parallel_size: int = option(default=1, help="stages of layers", aliases=("pp",))
    data_parallel_size: int = option(default=1, help="replicas", aliases=("dp",))
    enable_expert_parallel: bool = option(
        default=False, help="spread experts over the tensor devices"
    )


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Compilation and the device."""

    device: Literal["auto", "cpu", "gpu", "tpu"] = option(
        default="auto", help="the kind of device that must be there"
    )
    compile_cache: str = option(
        default="auto",
        help="directory of compiled programs (auto: under the cache directory; none: off)",
    )
    attention_backend: AttentionBackend = option(
        default="auto",
        help="implementation of attention: native (C++) or xla on a CPU, pallas_tpu or xla on a "
        "TPU, mosaic_gpu (Hopper), triton or xla on a GPU. auto: the best that the device has, "
        "which on a GPU must pass a check there",
    )
    native_kernels: bool = option(
        default=True,
        help="on a CPU, use C++ kernels (compiled at the first start) where they exist",
    )
    num_compile_workers: int | None = option(
        default=None, help="threads that compile (default: all cores)"
    )
    token_buckets: list[int] = option(
        default=[], help="token counts to compile for (default: chosen)"
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an EngineCore needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    speculative_config: dict[str, Any] = option(
        default={}, help="speculative decoding, JSON", aliases=("sc",)
    )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option(default="127.0.0.1", help="address to listen on")
    port: int = option(default=8000, help="port to listen on; 0 picks a free one")
    api_key: list[str] = option(default=[], help="keys that clients may use (none: no check)")
    served_model_name: list[str] = option(default=[], help="names of the model in the API")
    api_server_count: int = option(default=1, help="HTTP processes", aliases=("asc",))
    max_body_bytes: int = option(default=32 * 2**20, help="largest request body", units=True)
    metrics_prefix: str = option(
        default="jaxinfer", help="prefix of metric names; vllm for its dashboards"
    )
    disable_log_requests: bool = option(default=False, help="no log line per request")
    shutdown_timeout: float = option(
        default=0.0, help="seconds that running requests get at SIGTERM"
    )
    engine_stall_timeout: float = option(
        default=120.0,
        help="seconds without a step, while requests run, after which the engine core is "
        "restarted (0: never)",
    )
    engine_max_restarts: int = option(
        default=3,
        help="restarts of a lost engine core within 10 minutes before the server gives up",
    )
    root_path: str = option(default="", help="prefix of all routes, behind a proxy")
    response_role: str = option(default="assistant", help="role in chat answers")
    tool_call_parser: str | None = option(
        default=None, help="how tool calls are read from the output"
    )
    reasoning_parser: str | None = option(
        default=None, help="how reasoning is read from the output"
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        default="info", help="least level logged"
    )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What `jaxinfer serve` takes."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
