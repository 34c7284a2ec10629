"""The file of a batch job: settings as in `serve --config`, and the sections sampling, inputs and
outputs. Knows names and types; nothing of files' contents or of what a request may hold.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from jaxinfer.config.fields import build, nearest, settings_of
from jaxinfer.config.load import flag_values, named_values, read_mapping
from jaxinfer.config.schema import EngineConfig, ServerConfig, option
from jaxinfer.config.validate import validate
from jaxinfer.errors import ConfigError

Mode = Literal["chat", "completion"]
InputFormat = Literal["auto", "openai", "text", "jsonl", "csv", "parquet"]
OutputFormat = Literal["auto", "jsonl", "text", "parquet"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a job runs."""

    concurrency: int | None = option(
        default=None, help="requests in the engine at once (default: twice max_num_seqs)"
    )
    served_model_name: list[str] = option(
        default=[], help="names by which lines may call the model (default: the model's)"
    )
    response_role: str = option(default="assistant", help="role in chat answers")
    shutdown_timeout: float = option(
        default=20.0, help="seconds that lines in work get at SIGINT or SIGTERM"
    )
    engine_stall_timeout: float = option(
        default=120.0,
        help="seconds without a step after which the engine core is restarted (0: never)",
    )
    engine_max_restarts: int = option(
        default=3,
        help="losses of the engine core, without an answer between, that do not end the job",
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        default="info", help="least level logged"
    )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What `jaxinfer run` and `run-batch` take as flags."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class InputsConfig:
    """Where the lines come from, and how requests are made of them."""

    path: list[str] = option(default=[], help="files, globs or URLs")
    format: InputFormat = option(default="auto", help="how the files are read")
    mode: Mode = option(default="chat", help="what a prompt is: a user's message, or plain text")
    column: str | None = option(default=None, help="the column that holds the prompt")
    template: str | None = option(default=None, help="a prompt with {column} in it")
    id_column: str | None = option(default=None, help="the column that becomes custom_id")
    system: str | None = option(default=None, help="a system message before each prompt")


@dataclass(frozen=True, kw_only=True)
class OutputsConfig:
    """Where the answers go."""

    path: str = option(default="", help="a .jsonl or .txt file, or a .parquet directory")
    format: OutputFormat = option(default="auto", help="how they are written")
    rows_per_file: int = option(default=5000, help="rows of one Parquet file", units=True)
    work_dir: str | None = option(
        default=None, help="where answers are kept until they go to a URL"
    )


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A job."""

    batch: BatchConfig
    inputs: InputsConfig
    outputs: OutputsConfig
    sampling: dict[str, Any]  # fields of request bodies, for lines that do not give them


_SECTIONS = ("sampling", "inputs", "outputs")
_FORMATS: dict[str, InputFormat] = {
    ".jsonl": "openai",
    ".ndjson": "openai",
    ".txt": "text",
    ".csv": "csv",
    ".parquet": "parquet",
}
_OUTPUT_FORMATS: dict[str, Literal["jsonl", "text", "parquet"]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def job_config(args: argparse.Namespace) -> JobConfig:
    """The job of `args.job`, a YAML file, under the flags. Raises ConfigError."""
    where = str(args.job)
    content = read_mapping(Path(args.job), where=where)
    sections = {name: _section(content, name, where) for name in _SECTIONS}
    plain = {key: value for key, value in content.items() if key not in _SECTIONS}
    _refuse_strangers(plain, where)
    values = named_values(plain, BatchConfig, where=where) | flag_values(args, BatchConfig)
    inputs = _build_section(InputsConfig, sections["inputs"], f"{where}: inputs")
    outputs = _build_section(OutputsConfig, sections["outputs"], f"{where}: outputs")
    return checked_job(
        JobConfig(
            batch=build(BatchConfig, values),
            inputs=inputs,
            outputs=outputs,
            sampling=dict(sections["sampling"]),
        )
    )


def _section(content: Mapping[Any, Any], name: str, where: str) -> Mapping[Any, Any]:
    section = content.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
        raise ConfigError(f"{where}: {name}: expected `name: value` lines, got {section!r}.")
    return section


def _refuse_strangers(plain: Mapping[Any, Any], where: str) -> None:
    """Names that exist, but not here, get a better answer than "unknown"."""
    own = settings_of(BatchConfig)
    for key in plain:
        name = str(key).replace("-", "_")
        if name in own:
            continue
        if name in settings_of(ServerConfig):
            raise ConfigError(
                f"{where}: {key} is a setting of the HTTP server, and a job has none. Remove it."
            )
        for section, config_type in (("inputs", InputsConfig), ("outputs", OutputsConfig)):
            if name in settings_of(config_type):
                raise ConfigError(f"{where}: {key} belongs into the section {section}.")
        if near := nearest(name, _SECTIONS):
            raise ConfigError(f"{where}: unknown name {key!r}. Did you mean the section {near}?")


def _build_section(config_type: type, section: Mapping[Any, Any], where: str) -> Any:
    return build(config_type, named_values(section, config_type, where=where))


# ------------------------------------------------------------------------------------ checks


def input_format(inputs: InputsConfig, path: str) -> InputFormat:
    """How the file at `path` is read. Raises ConfigError when neither name nor setting says."""
    if inputs.format != "auto":
        return inputs.format
    plain = path.removesuffix(".gz").lower()
    for suffix, format_ in _FORMATS.items():
        if plain.endswith(suffix):
            wants_columns = inputs.column is not None or inputs.template is not None
            return "jsonl" if format_ == "openai" and wants_columns else format_
    raise ConfigError(
        f"inputs: {path}: its name does not tell how to read it. Set inputs.format to one of "
        "openai, text, jsonl, csv, parquet."
    )


def output_format(outputs: OutputsConfig) -> Literal["jsonl", "text", "parquet"]:
    """How the answers are written; JSON lines unless the path says another form."""
    if outputs.format != "auto":
        return outputs.format
    return _OUTPUT_FORMATS.get(_suffix(outputs.path), "jsonl")


def _suffix(path: str) -> str:
    """ ".parquet" of `s3://bucket/x.Parquet/`; empty where there is none."""
    return PurePosixPath(path.rstrip("/").lower()).suffix


def _check_output(outputs: OutputsConfig) -> None:
    """Raises ConfigError for a path that promises what is not written."""
    if not outputs.path:
        raise ConfigError("outputs.path must name where the answers go.")
    suffix = _suffix(outputs.path)
    if suffix in _PACKED:
        plain = outputs.path.rstrip("/")[: -len(suffix)]
        raise ConfigError(
            f"outputs.path={outputs.path!r}: answers are not packed as they are written (a job "
            f"that was killed could not go on in them). Name {plain!r} and pack it afterwards."
        )
    told = _OUTPUT_FORMATS.get(suffix)
    if told is not None and told != output_format(outputs):
        raise ConfigError(
            f"outputs.path={outputs.path!r} and outputs.format={outputs.format} contradict each "
            "other: change one."
        )
    if outputs.rows_per_file < 1:
        raise ConfigError(f"outputs.rows_per_file must be at least 1, got {outputs.rows_per_file}.")


def _check_json(value: Any, where: str) -> None:
    """Raises ConfigError for what YAML knows and JSON, which bodies are, does not."""
    match value:
        case dict():
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise ConfigError(f"{where}: the name {key!r} must be a text: quote it.")
                _check_json(inner, f"{where}.{key}")
        case list():
            for index, inner in enumerate(value):
                _check_json(inner, f"{where}[{index}]")
        case str() | bool() | int() | float() | None:
            return
        case _:
            raise ConfigError(
                f"{where}: {value} is a {type(value).__name__}, which JSON does not have. Quote "
                "it, if a text is meant."
            )


def checked_job(job: JobConfig) -> JobConfig:
    """`job`; raises ConfigError for values and combinations that make no sense."""
    validate(job.batch)
    inputs = job.inputs
    concurrency = job.batch.run.concurrency
    if concurrency is not None and concurrency < 1:
        raise ConfigError(f"concurrency must be at least 1, got {concurrency}.")
    if not inputs.path or not all(inputs.path):
        raise ConfigError("inputs.path must name at least one file.")
    _check_output(job.outputs)
    _check_json(job.sampling, "sampling")
    if inputs.column is not None and inputs.template is not None:
        raise ConfigError("inputs.column and inputs.template exclude each other: give one.")
    if inputs.system is not None and inputs.mode != "chat":
        raise ConfigError("inputs.system needs inputs.mode=chat: plain text has no system message.")
    return job


def check_columns(inputs: InputsConfig, path: str) -> None:
    """Raises ConfigError when what is said of columns does not fit the form of a file."""
    format_ = input_format(inputs, path)
    has_prompt = inputs.column is not None or inputs.template is not None
    if format_ in ("jsonl", "csv", "parquet") and not has_prompt:
        raise ConfigError(
            f"inputs: {path} has columns (format {format_}): name the one that holds the prompt "
            "with inputs.column, or give inputs.template."
        )
    if format_ in ("openai", "text") and (has_prompt or inputs.id_column is not None):
        raise ConfigError(
            f"inputs: {path} has no columns (format {format_}): remove column, template and "
            "id_column, or set inputs.format."
        )
    if format_ == "openai" and inputs.system is not None:
        raise ConfigError(
            f"inputs: the lines of {path} carry whole requests (format openai): remove system."
        )
