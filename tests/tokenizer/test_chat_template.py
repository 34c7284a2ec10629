"""Chat rendering against transformers' apply_chat_template, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from jaxinfer.errors import ConfigError, RequestError
from jaxinfer.tokenizer.source import TokenizerSource
from jaxinfer.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import templates
from tests.tokenizer.makers import byte_level, save

SYSTEM = {"role": "system", "content": 'Be <brief> & "kind".'}
USER = {"role": "user", "content": "  What is 2+2? ünïcode "}
ASSISTANT = {"role": "assistant", "content": "It is 4. "}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für <Stadt>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Why?"}],
}


def ours(template: str | dict[str, str]) -> Tokenizer:
    return Tokenizer(
        TokenizerSource(
            backend=byte_level(),
            named_tokens={"bos_token": "<s>", "eos_token": "</s>"},
            chat_templates=template if isinstance(template, dict) else {"default": template},
        )
    )


def theirs(messages: list[dict[str, Any]], template: str, **options: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>"
    )
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **options
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", templates.FAMILIES)
def test_renders_as_transformers(family: str, conversation: str, generation_prompt: bool) -> None:
    template, messages = templates.FAMILIES[family], CONVERSATIONS[conversation]
    expected = theirs(messages, template, add_generation_prompt=generation_prompt)
    got = ours(template).render_chat(messages, add_generation_prompt=generation_prompt)
    assert got == expected


@pytest.mark.parametrize("family", templates.FAMILIES)
def test_continues_as_transformers(family: str) -> None:
    messages = [SYSTEM, USER, {"role": "assistant", "content": "The answer  is "}]
    template = templates.FAMILIES[family]
    expected = theirs(messages, template, add_generation_prompt=False, continue_final_message=True)
    got = ours(template).render_chat(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert got == expected
    assert got.rstrip().endswith("The answer  is")


@pytest.mark.parametrize("family", ["qwen", "mistral"])
def test_tools_as_transformers(family: str) -> None:
    template = templates.FAMILIES[family]
    expected = theirs([SYSTEM, USER], template, tools=TOOLS, add_generation_prompt=True)
    assert ours(template).render_chat([SYSTEM, USER], tools=TOOLS) == expected


def test_documents_and_kwargs_as_transformers() -> None:
    documents = [{"title": "a", "text": "A"}, {"title": "b", "text": "B"}]
    expected = theirs([USER], templates.GRANITE, documents=documents, add_generation_prompt=True)
    assert ours(templates.GRANITE).render_chat([USER], documents=documents) == expected
    expected = theirs([USER], templates.QWEN, enable_thinking=False, add_generation_prompt=True)
    got = ours(templates.QWEN).render_chat([USER], template_kwargs={"enable_thinking": False})
    assert got == expected


def test_tool_call_arguments_are_parsed_and_reasoning_has_its_names() -> None:
    def turn(arguments: Any) -> list[dict[str, Any]]:
        call = {"id": "c1", "type": "function"}
        function = {"name": "weather", "arguments": arguments}
        return [
            USER,
            {
                "role": "assistant",
                "content": None,
                "reasoning": "hm",
                "tool_calls": [{**call, "function": function}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "12°"},
        ]

    arguments = {"city": "Köln", "n": 2}
    messages = turn(json.dumps(arguments))
    before = json.dumps(messages)
    got = ours(templates.QWEN).render_chat(messages)
    assert got == theirs(turn(arguments), templates.QWEN, add_generation_prompt=True)
    assert "<think>hm</think>" in got
    assert json.dumps(messages) == before  # the caller's objects are left alone
    with pytest.raises(RequestError, match=r"messages\[1\].tool_calls\[0\].*must be JSON"):
        ours(templates.QWEN).render_chat(turn("{city"))


PARTS = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (templates.CHATML, "<|im_start|>user\na\nb<|im_end|>\n"),
        (templates.PARTS_OR_TEXT, "user:[a][b]"),
        (templates.PARTS_ONLY, "user:[a][b]"),
    ],
)
def test_parts_are_joined_unless_the_template_wants_them(template: str, expected: str) -> None:
    text = ours(template).render_chat(
        [SYSTEM, {"role": "user", "content": PARTS}], add_generation_prompt=False
    )
    assert text.endswith(expected)


def test_string_becomes_a_part_only_where_the_template_takes_no_string() -> None:
    assert ours(templates.PARTS_OR_TEXT).render_chat([ASSISTANT]) == "assistant:It is 4. "
    assert ours(templates.PARTS_ONLY).render_chat([ASSISTANT]) == "assistant:[It is 4. ]"


def test_continues_a_final_message_of_parts() -> None:
    message = {"role": "assistant", "content": PARTS}
    got = ours(templates.PARTS_ONLY).render_chat(
        [message], add_generation_prompt=False, continue_final_message=True
    )
    assert got == "assistant:[a][b"
    assert message["content"][-1]["text"] == "b"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must not be empty"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\] must be an object with a string 'role'"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "type must be text, got 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "text is required"),
        ([{"role": "assistant", "tool_calls": [3]}], "function must be an object"),
        ([USER, USER], "refuses these messages: Roles must alternate"),
        ([SYSTEM], "cannot render|refuses"),
    ],
)
def test_bad_messages_are_the_callers_fault(messages: Any, message: str) -> None:
    template = templates.LLAMA2 + "{{ messages[1].content + '' }}"
    with pytest.raises(RequestError, match=message) as caught:
        ours(template).render_chat(messages)
    assert (caught.value.param or "").startswith("messages")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in %}", "not valid Jinja"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ namespace(__class__=1) }}", "cannot hold"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "cannot hold"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0] + 1 }}", "TypeError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
    ],
)
def test_hostile_template_of_a_request(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ours(templates.CHATML).render_chat([USER], chat_template=template)


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([USER, ASSISTANT], {"add_generation_prompt": True}),
        ([USER, {"role": "assistant"}], {"add_generation_prompt": False}),
        ([USER, {"role": "assistant", "content": []}], {"add_generation_prompt": False}),
    ],
)
def test_continue_that_cannot_be(messages: Any, options: dict[str, Any]) -> None:
    tokenizer = ours(templates.PARTS_OR_TEXT)
    with pytest.raises(RequestError, match="continue_final_message=true"):
        tokenizer.render_chat(messages, continue_final_message=True, **options)


def test_continue_where_the_template_hides_the_message() -> None:
    with pytest.raises(RequestError, match="does not show the final message"):
        ours("{{ messages[0].content }}").render_chat(
            [USER, ASSISTANT], continue_final_message=True, add_generation_prompt=False
        )


def test_helpers_as_transformers() -> None:
    template = (
        "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
        "{{ dict(a=1).a }}{{ dict.fromkeys(['b'], 2).b }}"
        "{{ {'k': '<é>'} | tojson(indent=2) }}{{ strftime_now('%Y') }}"
        "\n    {% if true %}\n  X\n    {% endif %}\n{{ messages[0].name is defined }}"
        "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}"
    )
    messages = [{**USER, "name": None}]
    assert ours(template).render_chat(messages) == theirs(messages, template)


def test_named_templates() -> None:
    many = {"default": "D", "tool_use": "T", "rag": "R"}
    assert ours(many).render_chat([USER]) == "D"
    assert ours(many).render_chat([USER], tools=TOOLS) == "T"
    assert ours(many).render_chat([USER], chat_template="rag") == "R"
    assert ours(many).render_chat([USER], chat_template="{{ 'own' }}") == "own"
    with pytest.raises(RequestError, match=r"one of \['rag'\]"):
        ours({"rag": "R"}).render_chat([USER])
    with pytest.raises(RequestError, match="no chat template"):
        ours({}).render_chat([USER])
    assert not ours({}).has_chat_template
    assert ours(many).has_chat_template


def test_template_flag(tmp_path: Path) -> None:
    directory = save(byte_level(), tmp_path / "model", chat_template="MODEL")
    file = tmp_path / "mine.jinja"
    file.write_text("FILE {{ bos_token }}", encoding="utf-8")
    assert load_tokenizer(directory).render_chat([USER]) == "MODEL"
    assert load_tokenizer(directory, chat_template=str(file)).render_chat([USER]) == "FILE <s>"
    inline = load_tokenizer(directory, chat_template="{{ 'IN' }}")
    assert inline.render_chat([USER]) == "IN"
    assert load_tokenizer(directory, chat_template="default").render_chat([USER]) == "MODEL"
    with pytest.raises(ConfigError, match="chat_template='nowhere.jinja'"):
        load_tokenizer(directory, chat_template="nowhere.jinja")
    with pytest.raises(ConfigError, match="not valid Jinja"):
        load_tokenizer(directory, chat_template="{% if %}")
