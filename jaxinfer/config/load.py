"""Settings from where users write them: command line, YAML file, keyword arguments.

All three are generated from the fields of `config/schema.py` and use its names; the command line
wins over the file, the file over the defaults. Knows nothing of what the settings do.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jaxinfer.config.convert import convert
from jaxinfer.config.fields import Setting, build, nearest, settings_of
from jaxinfer.config.schema import EngineConfig, ServeConfig
from jaxinfer.config.validate import validate
from jaxinfer.errors import ConfigError

ConfigT = TypeVar("ConfigT")

VLLM_ONLY = {
    "enforce_eager": "every shape is compiled before /ready and kept in --compile-cache",
    "enable_chunked_prefill": "prompts are always computed in chunks",
    "swap_space": "preempted requests are computed again, not swapped",
    "cpu_offload_gb": "weights stay on the device",
    "max_logprobs": "20 is the most for every model",
    "hf_token": "set HF_TOKEN in the environment",
    "uvicorn_log_level": "use --log-level",
    "enable_log_requests": "requests are logged unless --disable-log-requests is given",
    "distributed_executor_backend": "one process drives all devices of a host",
    "compilation_config": "use --compile-cache, --token-buckets and --num-compile-workers",
}
"""vLLM's flags that have no counterpart on purpose -> what to know or do instead."""


def _names(config_type: type) -> dict[str, Setting]:
    """Every spelling (with underscores) -> its setting."""
    settings = settings_of(config_type)
    names = dict(settings)
    for setting in settings.values():
        names |= dict.fromkeys(setting.aliases, setting)
    return names


def unknown_name_hint(name: str, valid: Iterable[str]) -> str:
    """What to say after "unknown NAME": vLLM's flag explained, or the nearest valid name."""
    plain = name.lstrip("-").replace("-", "_").removeprefix("no_")
    if plain in VLLM_ONLY:
        return f" That flag of vLLM's does not exist here: {VLLM_ONLY[plain]}."
    near = nearest(name, valid)
    return f" Did you mean {near}?" if near else ""


# ------------------------------------------------------------------------------ command line


def _option_strings(setting: Setting) -> list[str]:
    """--name, --alias; short aliases like vLLM's -tp with one dash too."""
    short = [f"-{alias}" for alias in setting.aliases if len(alias) <= 3 and setting.kind != "bool"]
    return [*short, setting.flag, *("--" + alias.replace("_", "-") for alias in setting.aliases)]


def _help_of(setting: Setting) -> str:
    text = setting.help.replace("%", "%%")
    shown = setting.default not in (None, "", [], {}) and "default" not in text
    return f"{text} (default: {setting.default})" if shown else text


def add_flags(
    parser: argparse.ArgumentParser,
    config_type: type,
    *,
    model_argument: bool,
    config_file: bool = True,
) -> None:
    """Adds a flag for every setting of `config_type`, and (with `config_file`) --config.

    Values stay text here: `config_from_args` converts them, so that flags and YAML keys fail
    with the same words. With `model_argument` MODEL may be given without --model.
    """
    if model_argument:
        parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="same as --model")
    if config_file:
        text = "settings, one `name: value` a line"
        parser.add_argument("--config", metavar="FILE.yaml", help=text)
    group, section = parser.add_argument_group("settings"), ""
    for setting in settings_of(config_type).values():
        if setting.section != section:
            section = setting.section
            group = parser.add_argument_group(section.removesuffix("Config").lower() + " settings")
        arguments: dict[str, Any] = {
            "dest": f"setting_{setting.name}",
            "default": argparse.SUPPRESS,
            "help": _help_of(setting),
        }
        if setting.kind == "bool":
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            placeholder = "|".join(setting.choices) if setting.kind == "choice" else None
            arguments["metavar"] = setting.metavar or placeholder or setting.kind.split("_")[0]
        if setting.kind.endswith("_list"):
            arguments |= {"nargs": "+", "action": "extend"}
        group.add_argument(*_option_strings(setting), **arguments)


def flag_values(args: argparse.Namespace, config_type: type) -> dict[str, Any]:
    """Setting name -> value of the flags that were written."""
    settings = settings_of(config_type)
    values = {
        name: convert(setting, vars(args)[f"setting_{name}"], where=setting.flag)
        for name, setting in settings.items()
        if f"setting_{name}" in vars(args)
    }
    argument = vars(args).get("model_argument")
    if argument is not None and values.setdefault("model", argument) != argument:
        raise ConfigError(
            f"MODEL is {argument!r} but --model is {values['model']!r}: give one of them."
        )
    return values


def config_from_args(args: argparse.Namespace, config_type: type[ConfigT]) -> ConfigT:
    """The validated configuration of a parser that `add_flags` filled."""
    values = {}
    if args.config is not None:
        values = read_yaml(Path(args.config), config_type)
    config = build(config_type, values | flag_values(args, config_type))
    validate(config)
    return config


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The configuration of `jaxinfer serve`."""
    return config_from_args(args, ServeConfig)


# ------------------------------------------------------------------------------------- YAML


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML forbids a key that is there twice; PyYAML would take the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, str) and key in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key} is given twice", problem_mark=key_node.start_mark
                )
            keys.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep=deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """PyYAML's complaint in one line; its own text shows the place over six."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def read_mapping(path: Path, *, where: str) -> dict[Any, Any]:
    """A YAML file with a mapping in it; raises ConfigError that begins with `where`."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 text.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not YAML: {_yaml_problem(error)}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected `name: value` lines, got a {type(content).__name__}.")
    return content


def read_yaml(path: Path, config_type: type) -> dict[str, Any]:
    """Setting name -> value of a YAML file with flat keys, named like the flags (- or _)."""
    return named_values(read_mapping(path, where=f"--config {path}"), config_type, where=str(path))


# -------------------------------------------------------------------------------- arguments


def named_values(given: Mapping[Any, Any], config_type: type, *, where: str) -> dict[str, Any]:
    """Setting name -> converted value of a mapping that users wrote; raises ConfigError."""
    names = _names(config_type)
    values: dict[str, Any] = {}
    for key, value in given.items():
        plain = str(key).replace("-", "_")
        if plain not in names:
            raise ConfigError(f"{where}: unknown name {key!r}.{unknown_name_hint(plain, names)}")
        setting = names[plain]
        if setting.name in values:
            raise ConfigError(f"{where}: {setting.name} is given twice (the second as {key!r}).")
        values[setting.name] = convert(setting, value, where=f"{where}: {key}")
    return values


def engine_config_from_kwargs(**kwargs: Any) -> EngineConfig:
    """The validated configuration of `LLM(model, **engine_args)`; raises ConfigError."""
    config = build(EngineConfig, named_values(kwargs, EngineConfig, where="engine argument"))
    validate(config)
    return config
