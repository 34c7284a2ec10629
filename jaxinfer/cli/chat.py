"""`jaxinfer chat`: a conversation in the terminal, or one turn a line of piped stdin."""

import sys
from collections.abc import Sequence

from jaxinfer.cli.parser import Parser
from jaxinfer.cli.sampling_flags import add_sampling_flags, check_sampling_flags, sampling_params
from jaxinfer.cli.session import Session
from jaxinfer.config.load import add_flags, config_from_args
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.errors import ConfigError, RequestError
from jaxinfer.logging import configure_logging
from jaxinfer.tokenizer.tokenizer import Tokenizer

_HELP = "/reset forgets the conversation, /exit ends it; Ctrl-C stops an answer."


def _parser() -> Parser:
    parser = Parser(prog="jaxinfer chat", description="Talk to a model in the terminal.")
    parser.add_argument("--system", help="system message")
    parser.add_log_level("warning")
    add_sampling_flags(parser, max_tokens=None)
    add_flags(parser, EngineConfig, model_argument=True)
    return parser


class Conversation:
    """The messages so far, and how to add a turn."""

    def __init__(self, session: Session, params: SamplingParams, *, system: str | None) -> None:
        self._session = session
        self._params = params
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)

    def reset(self) -> None:
        self._messages = list(self._start)

    def say(self, text: str) -> None:
        """Prints the answer to `text`. What fails or is interrupted leaves no trace."""
        messages = [*self._messages, {"role": "user", "content": text}]
        tokenizer = self._session.tokenizer
        prompt = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        pieces: list[str] = []

        def on_text(piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        try:
            self._session.stream(prompt, self._params, on_text)
        finally:
            print(flush=True)
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def _turn(conversation: Conversation, line: str) -> bool:
    """Handles one line; False ends the conversation."""
    text = line.strip()
    if text in ("/exit", "/quit"):
        return False
    if text == "/reset":
        conversation.reset()
        print("(new conversation)", file=sys.stderr)
    elif text == "/help":
        print(_HELP, file=sys.stderr)
    elif text.startswith("/"):
        print(f"Unknown command {text.split()[0]}. {_HELP}", file=sys.stderr)
    elif text:
        try:
            conversation.say(text)
        except RequestError as error:  # too long, most likely: the user can go on after /reset
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
    return True


def _read_line(*, is_terminal: bool) -> str | None:
    try:
        return input("> " if is_terminal else "")
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            print()
        return None


def run(argv: Sequence[str]) -> int:
    """0 at the end of the conversation."""
    args = _parser().parse(argv)
    config = config_from_args(args, EngineConfig)
    check_sampling_flags(args, config.model)
    configure_logging(args.log_level)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  importing it gives input() history and editing

    def check(tokenizer: Tokenizer) -> None:
        if not tokenizer.has_chat_template:
            raise ConfigError(
                "This model has no chat template: give one with --chat-template FILE, "
                "or use `jaxinfer generate`."
            )
        start = [] if args.system is None else [{"role": "system", "content": args.system}]
        tokenizer.render_chat([*start, {"role": "user", "content": "x"}])
        sampling_params(args, config.model, tokenizer)

    with Session(config, log_level=args.log_level, check=check) as session:
        params = sampling_params(args, config.model, session.tokenizer)
        conversation = Conversation(session, params, system=args.system)
        if is_terminal:
            print(_HELP, file=sys.stderr)
        while (line := _read_line(is_terminal=is_terminal)) is not None:
            if not _turn(conversation, line):
                break
    return 0
