"""`jaxinfer bench serve`: its flags and its table. The measuring is in bench/serve.py.

With --base-url it measures a server that runs; else it starts one from MODEL and the settings.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxinfer.bench.client import ENDPOINTS, Target
from jaxinfer.bench.load import LoadShape
from jaxinfer.bench.prompts import DATASETS, PromptSource
from jaxinfer.bench.serve import ServeRun, ServeSettings, find_model, measure_level
from jaxinfer.bench.server_process import JaxInferServer, check_base_url
from jaxinfer.bench.tables import serve_table
from jaxinfer.cli.bench_output import (
    add_output_flags,
    check_counts,
    check_output,
    json_lines,
    table_stream,
)
from jaxinfer.cli.parser import Parser
from jaxinfer.config import env
from jaxinfer.config.load import add_flags, config_from_args
from jaxinfer.config.schema import ServeConfig
from jaxinfer.errors import ConfigError
from jaxinfer.logging import configure_logging

_FOR_ANY_SERVER = ("model", "seed", "api_key", "log_level")
_MOST_VOCABULARIES = 32_000


def _parser() -> Parser:
    parser = Parser(
        prog="jaxinfer bench serve",
        description="Times of a server under load. The settings are those of the server that is "
        "started when no --base-url is given; --seed is also that of prompts and arrivals.",
    )
    parser.add_argument("--base-url", metavar="URL", help="a server that runs, of any make")
    parser.add_argument("--endpoint", choices=ENDPOINTS, default=ENDPOINTS[0], help="its route")
    parser.add_argument("--num-prompts", type=int, default=100, help="requests of each level")
    parser.add_argument(
        "--num-warmups", type=int, default=2, help="requests before them, in none of the figures"
    )
    parser.add_argument(
        "--request-rate", type=float, default=float("inf"), help="requests a second (inf: at once)"
    )
    parser.add_argument(
        "--burstiness", type=float, default=1.0, help="1: Poisson; less: in bursts; more: evenly"
    )
    parser.add_argument(
        "--max-concurrency",
        type=int,
        nargs="+",
        metavar="N",
        help="most requests at a time; several numbers measure one level after the other",
    )
    parser.add_argument("--dataset", "--dataset-name", choices=DATASETS, default="random")
    parser.add_argument(
        "--dataset-path", metavar="FILE", help="ShareGPT JSON, or a prompt (or {prompt}) a line"
    )
    parser.add_argument("--input-len", type=int, default=128, help="tokens of random prompts")
    parser.add_argument("--output-len", type=int, default=128, help="most tokens of an answer")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="answers have all of their --output-len tokens"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="random token ids are below it (default: the model's; with --base-url 32000)",
    )
    parser.add_argument("--request-timeout", type=float, default=600.0, help="seconds")
    add_output_flags(parser)
    add_flags(parser, ServeConfig, model_argument=True)
    return parser


def _check(args: argparse.Namespace) -> None:
    check_counts(args, num_prompts=1, num_warmups=0, input_len=1, output_len=1)
    if args.vocab_size is not None:
        check_counts(args, vocab_size=1)
    if not args.request_timeout > 0:
        raise ConfigError(f"--request-timeout={args.request_timeout} must be more than 0 seconds.")
    given = [name.removeprefix("setting_") for name in vars(args) if name.startswith("setting_")]
    for name in given:
        flag = "--" + name.replace("_", "-")
        if name in ("host", "port"):
            raise ConfigError(
                f"{flag} says nothing here: give --base-url http://HOST:PORT to measure a server "
                "that runs; one that is started for this gets a free port."
            )
        if args.base_url is not None and name not in _FOR_ANY_SERVER:
            raise ConfigError(
                f"{flag} is for a server that is started here, but --base-url names one that runs: "
                "leave one of them out."
            )


def _settings(args: argparse.Namespace, *, seed: int, vocab_size: int) -> ServeSettings:
    levels = args.max_concurrency or [None]
    shape = LoadShape(request_rate=args.request_rate, burstiness=args.burstiness, seed=seed)
    for level in levels:
        LoadShape(max_concurrency=level)  # raises what is wrong with it
    return ServeSettings(
        source=PromptSource(
            dataset=args.dataset,
            path=None if args.dataset_path is None else Path(args.dataset_path),
            input_len=args.input_len,
            output_len=args.output_len,
            vocab_size=vocab_size,
            seed=seed,
        ),
        shape=shape,
        num_prompts=args.num_prompts,
        num_warmups=args.num_warmups,
        concurrencies=tuple(levels),
    )


def _vocab_size(args: argparse.Namespace, config: ServeConfig) -> int:
    """That of the model which will be served; of another's server nothing is known."""
    if args.vocab_size is not None:
        return args.vocab_size
    if args.base_url is not None:
        return _MOST_VOCABULARIES

    from jaxinfer.engine.model_source import load_model_tokenizer
    from jaxinfer.engine.progress import start_progress

    with start_progress() as on_progress:
        return load_model_tokenizer(config.engine, on_progress).tokenizer.vocab_size


@contextmanager
def _target(args: argparse.Namespace, config: ServeConfig) -> Iterator[Target]:
    """The server to measure; one that is started here runs inside of the context only."""
    keys = [*config.server.api_key, *filter(None, [env.api_key()])]
    target = Target(
        base_url="",
        endpoint=args.endpoint,
        model="",
        api_key=keys[0] if keys else None,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        request_timeout_s=args.request_timeout,
    )
    if args.base_url is None:
        print("Starting a server ...", file=sys.stderr)
        with JaxInferServer(config) as server:
            print(f"Ready after {server.startup_s:.1f} s.", file=sys.stderr)
            yield find_model(target.at(server.base_url))
        return
    target = target.at(check_base_url(args.base_url))
    is_named = args.model_argument is not None or "setting_model" in vars(args)
    yield target.of(config.engine.model.model) if is_named else find_model(target)


def run(argv: Sequence[str]) -> int:
    """Prints one table when all levels are measured; 1 if at some level every request failed."""
    args = _parser().parse(argv)
    _check(args)
    config = config_from_args(args, ServeConfig)
    check_output(args)
    configure_logging(config.server.log_level)
    settings = _settings(args, seed=config.engine.model.seed, vocab_size=_vocab_size(args, config))
    runs: list[ServeRun] = []
    with json_lines(args.json) as write_row, _target(args, config) as target:
        for level, concurrency in enumerate(settings.concurrencies):
            print(
                f"{settings.num_warmups} + {settings.num_prompts} requests, concurrency "
                f"{concurrency or 'without limit'} ...",
                file=sys.stderr,
            )
            runs.append(measure_level(target, settings, level))
            write_row(runs[-1].report)
    print("\n".join(serve_table([one.report for one in runs])), file=table_stream(args))
    if args.plot is not None:
        from jaxinfer.bench.plots import plot_serve

        plot_serve(runs, args.plot)
    return 0 if all(one.report.num_ok for one in runs) else 1
