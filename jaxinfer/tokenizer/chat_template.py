"""Renders chat messages with a model's Jinja template, as Hugging Face does.

Knows templates and messages; knows nothing of tokens or HTTP. Templates come from checkpoints and
are not trusted: they run in Jinja's immutable sandbox and see only JSON-like values.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jaxinfer.errors import ConfigError, RequestError
from jaxinfer.tokenizer.messages import plain_messages

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # ends in a space: shows whether spaces survive
_MAX_CACHED_TEMPLATES = 32  # requests may bring their own

# What untrusted template code can raise beside jinja2.TemplateError.
_TEMPLATE_FAULTS = (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: marks text for training, here just its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainDict:
    """`dict(...)` in a template, without the attributes of the real type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _GuardedNamespace(Namespace):
    """`namespace(...)` whose attributes cannot be Python internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name one `self`
        for name in dict(*args[1:], **kwargs):
            _reject_private(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _reject_private(name)
        super().__setitem__(name, value)


def _reject_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.now().strftime(format_string)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  (the signature templates know)
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON as it is, where Jinja's own filter would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _PlainDict(),
        "namespace": _GuardedNamespace,
    }
    return environment


class ChatTemplate:
    """One compiled template. Raises ConfigError when it is not valid Jinja."""

    def __init__(self, source: str) -> None:
        self._source = source
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            syntax = environment.parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            problem = str(error).rstrip(".")
            raise ConfigError(f"The chat template is not valid Jinja: {problem}.") from error
        self._wants_parts = _iterates_content(syntax)
        self._takes_strings = not self._wants_parts or _tests_for_string(syntax)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `variables` are the special tokens and the request's own kwargs.

        Raises RequestError when the messages are malformed or the template refuses them.
        """
        chat = plain_messages(
            messages, keep_parts=self._wants_parts, wrap_strings=not self._takes_strings
        )
        final_text = ""
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message=true and add_generation_prompt=true exclude each "
                    "other; send add_generation_prompt=false.",
                    param="continue_final_message",
                )
            final_text = self._mark_final_message(chat)
        context = {
            "documents": documents,
            **(variables or {}),
            "messages": chat,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        text = _run(lambda: self._template.render(context))
        if continue_final_message:
            text = _cut_at_mark(text, final_text)
        return text

    def _mark_final_message(self, chat: list[dict[str, Any]]) -> str:
        """Puts the mark behind the final message's text, in place, and returns that text."""
        content = chat[-1].get("content")
        if "content" not in self._source or content is None:
            raise RequestError(
                "continue_final_message=true needs a final message with content, and a chat "
                "template that shows it.",
                param="continue_final_message",
            )
        if isinstance(content, str):
            chat[-1]["content"] = content + _CONTINUE_MARK
            return content
        parts = [dict(part) for part in content]
        for part in reversed(parts):
            if "text" in part:
                text = part["text"]
                part["text"] = text + _CONTINUE_MARK
                chat[-1]["content"] = parts
                return text
        raise RequestError(
            "continue_final_message=true, but the final message has no text part.",
            param="continue_final_message",
        )


def _run(render: Callable[[], str]) -> str:
    try:
        return render()
    except jinja2.TemplateError as error:
        raise RequestError(
            f"The chat template refuses these messages: {error}", param="messages"
        ) from error
    except _TEMPLATE_FAULTS as error:
        raise RequestError(
            f"The chat template cannot render these messages ({type(error).__name__}: {error}).",
            param="messages",
        ) from error


def _cut_at_mark(text: str, final_text: str) -> str:
    """What stands before the mark; the spaces in front of it go if the template trimmed."""
    mark = _CONTINUE_MARK.strip()
    if mark not in text or final_text.strip() not in text:
        raise RequestError(
            "continue_final_message=true, but the chat template does not show the final message "
            "as it is.",
            param="continue_final_message",
        )
    cut = text.rindex(mark)
    kept = text[:cut]
    return kept if text.startswith(_CONTINUE_MARK, cut) else kept.rstrip()


@lru_cache(maxsize=_MAX_CACHED_TEMPLATES)
def compile_chat_template(source: str) -> ChatTemplate:
    """The compiled form of `source`, cached; raises ConfigError when it is not valid Jinja."""
    return ChatTemplate(source)


def _iterates_content(syntax: nodes.Template) -> bool:
    """Whether the template loops over a message's content, i.e. wants it as a list of parts.

    True when some `for` runs over `x.content`, `x['content']`, a variable named `content` or one
    set from such an expression. vLLM decides in the same spirit (its "openai" format).
    """
    names = {"content"}
    for assign in syntax.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in syntax.find_all(nodes.For))


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    match node:
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name(name=name):
            return name in names
        case nodes.Filter(node=nodes.Node() as inner):  # e.g. `content | list`
            return _is_content(inner, names)
    return False


def _tests_for_string(syntax: nodes.Template) -> bool:
    return any(test.name in ("string", "iterable") for test in syntax.find_all(nodes.Test))
