"""`jaxinfer generate`: completes one prompt and prints it as it comes."""

import sys
from collections.abc import Sequence

from jaxinfer.cli.parser import Parser
from jaxinfer.cli.sampling_flags import add_sampling_flags, check_sampling_flags, sampling_params
from jaxinfer.cli.session import Session
from jaxinfer.config.load import add_flags, config_from_args
from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.logging import configure_logging
from jaxinfer.tokenizer.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 256


def _parser() -> Parser:
    parser = Parser(prog="jaxinfer generate", description="Completes one prompt.")
    parser.add_argument("-p", "--prompt", help="the prompt (default: what stdin holds)")
    parser.add_argument(
        "--chat", action="store_true", help="take the prompt as a user's message to a chat model"
    )
    parser.add_log_level("warning")
    add_sampling_flags(parser, max_tokens=_DEFAULT_MAX_TOKENS)
    add_flags(parser, EngineConfig, model_argument=True)
    return parser


def _prompt_text(given: str | None) -> str:
    if given is not None:
        return given
    if sys.stdin.isatty():
        raise ConfigError("No prompt: give -p PROMPT, or send it to stdin.")
    return sys.stdin.read()


def _token_ids(text: str, tokenizer: Tokenizer, *, is_chat: bool) -> list[int]:
    if is_chat:
        rendered = tokenizer.render_chat([{"role": "user", "content": text}])
        return tokenizer.encode(rendered, add_special_tokens=False)
    token_ids = tokenizer.encode(text)
    if not token_ids:
        raise ConfigError("The prompt is empty: give -p PROMPT, or send it to stdin.")
    return token_ids


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def run(argv: Sequence[str]) -> int:
    """0 when the answer is complete."""
    args = _parser().parse(argv)
    config = config_from_args(args, EngineConfig)
    text = _prompt_text(args.prompt)
    check_sampling_flags(args, config.model)
    configure_logging(args.log_level)

    def check(tokenizer: Tokenizer) -> None:
        _token_ids(text, tokenizer, is_chat=args.chat)
        sampling_params(args, config.model, tokenizer)

    with Session(config, log_level=args.log_level, check=check) as session:
        params = sampling_params(args, config.model, session.tokenizer)
        prompt = _token_ids(text, session.tokenizer, is_chat=args.chat)
        session.stream(prompt, params, _print_piece)
        print()
    return 0
