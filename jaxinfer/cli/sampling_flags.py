"""Flags that say how to sample, shared by `generate` and `chat`. Knows no engine."""

import argparse
from typing import Any

from jaxinfer.config.schema import ModelConfig
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.model_source import sampling_defaults
from jaxinfer.errors import ConfigError, RequestError
from jaxinfer.tokenizer.tokenizer import Tokenizer

_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, "0 takes the most likely token"),
    ("top_p", float, "least probability mass to sample from"),
    ("top_k", int, "most tokens to sample from"),
    ("min_p", float, "least probability, relative to the most likely token's"),
    ("repetition_penalty", float, "above 1: avoid tokens that were there"),
)


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """Adds the flags; what is not given comes from the model's generation_config.json."""
    group = parser.add_argument_group("sampling (default: the model's)")
    for name, kind, text in _FLAGS:
        group.add_argument("--" + name.replace("_", "-"), dest=name, type=kind, help=text)
    shown = "what the context leaves" if max_tokens is None else max_tokens
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, help=f"longest answer (default: {shown})"
    )
    group.add_argument("--stop", nargs="+", default=[], help="texts that end the answer")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end")


def _given(args: argparse.Namespace, model: ModelConfig) -> dict[str, Any]:
    given = vars(args)
    values = {name: given[name] for name, _, _ in _FLAGS if given[name] is not None}
    if "setting_seed" in given:  # only when --seed was written: its default must not fix a chat
        values["seed"] = model.seed
    return values | {
        "max_tokens": args.max_tokens,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos,
    }


def check_sampling_flags(args: argparse.Namespace, model: ModelConfig) -> None:
    """Raises ConfigError for a value out of range, before a model is looked for."""
    if args.max_tokens is not None and args.max_tokens < 1:
        raise ConfigError(f"--max-tokens must be at least 1, got {args.max_tokens}.")
    try:
        SamplingParams(**_given(args, model))
    except RequestError as error:
        flag = "--" + (error.param or "").replace("_", "-")
        raise ConfigError(f"{flag}: {error}") from error


def sampling_params(
    args: argparse.Namespace, model: ModelConfig, tokenizer: Tokenizer
) -> SamplingParams:
    """The flags over the model's defaults."""
    defaults = sampling_defaults(tokenizer, model)
    values = {name: defaults[name] for name, _, _ in _FLAGS if name in defaults}
    return SamplingParams(**(values | _given(args, model)))
