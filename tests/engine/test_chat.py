# ruff: noqa: E501 (a template is a line)
"""Chat templates: transformers' apply_chat_template is the oracle."""

from __future__ import annotations

import copy
import os
from datetime import datetime

import jinja2
import pytest
from engine_parts import byte_level

from tuili.base.errors import ConfigError, ModelError, RequestError
from tuili.engine.chat import ChatTemplate, find_template, normalize
from tuili.engine.dialect import Dialect

CHATML = (
    "{%- if tools %}<|im_start|>system\n# Tools\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}<call>{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = """
{{- bos_token }}
{%- set date = date_string if date_string is defined else strftime_now("%d %b %Y") %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" + date + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- else %}{% continue %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PARTS = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% for part in message.content %}({{ part.type }}:{{ part.text }}){% endfor %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "Hi <b>&'\"你好 🙂  "},
    {"role": "assistant", "content": "Hello\n there "},
    {"role": "user", "content": "Tell me more"},
]
SYSTEM = {"role": "system", "content": " Be brief. "}
NOW = datetime(2026, 3, 4)


def oracle(template: str, messages: list[dict], **options) -> str:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend, **SPECIAL)
    return tokenizer.apply_chat_template(
        copy.deepcopy(messages), chat_template=template, tokenize=False, date_string="04 Mar 2026", **options
    )


def render(template: str, messages: list[dict], **options) -> str:
    return ChatTemplate(template, lambda: NOW).render(messages, special_tokens=SPECIAL, **options)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("messages", [TALK, [SYSTEM, *TALK], TALK[:1]], ids=["talk", "system", "one"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name, messages, generate):
    if name == "gemma" and messages[0] is SYSTEM:
        with pytest.raises(RequestError, match="System role not supported") as raised:
            render(GEMMA, messages)
        assert raised.value.param == "messages"
        return
    expected = oracle(TEMPLATES[name], messages, add_generation_prompt=generate)
    assert render(TEMPLATES[name], messages, add_generation_prompt=generate) == expected


def test_tools_and_tool_calls_equal_transformers():
    tool = {"type": "function", "function": {"name": "f", "description": "<ü & 'x'>", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Zürich", "n": 1}}}
    messages = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    expected = oracle(CHATML, messages, tools=[tool], add_generation_prompt=True)
    as_openai = copy.deepcopy(messages)
    as_openai[1]["content"] = None
    as_openai[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Zürich", "n": 1}'
    assert render(CHATML, as_openai, tools=[tool]) == expected
    assert "Zürich" in expected, "no HTML or unicode escapes"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("end", ["and then", "and then ", " trimmed\n"])
def test_continue_final_message_equals_transformers(name, end):
    messages = [TALK[0], {"role": "assistant", "content": end}]
    expected = oracle(TEMPLATES[name], messages, continue_final_message=True)
    got = render(TEMPLATES[name], messages, continue_final_message=True, add_generation_prompt=False)
    assert got == expected
    assert got.rstrip().endswith(end.strip())


def test_continue_final_message_errors():
    with pytest.raises(RequestError, match="exclude each other"):
        render(CHATML, TALK, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(RequestError, match="empty"):
        render(
            CHATML, [{"role": "assistant", "content": " "}], continue_final_message=True, add_generation_prompt=False
        )


def test_date_and_variables():
    assert "04 Mar 2026" in render(LLAMA3, TALK)
    assert "yesterday" in render(LLAMA3, TALK, kwargs={"date_string": "yesterday"})
    assert render("{{ documents[0].title }}", TALK, documents=[{"title": "D"}]) == "D"
    assert render("{% if enable_thinking %}T{% endif %}", TALK, kwargs={"enable_thinking": True}) == "T"
    assert render("a{% generation %}b{% endgeneration %}c", TALK) == "abc"


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (CHATML, False),
        (LLAMA3, False),
        (GEMMA, False),
        (PARTS, True),
        ("{% for m in messages %}{% for c in m['content'] | list %}{{ c }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set body = m.content %}{% for c in body %}{{ c }}{% endfor %}{% endfor %}", True),
        (
            "{% macro show(content) %}{% for c in content %}{{ c.text }}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
            True,
        ),
        (
            "{% for m in messages %}{% for call in m.tool_calls %}{{ call }}{% endfor %}{{ m.content }}{% endfor %}",
            False,
        ),
    ],
)
def test_content_format_is_read_from_the_template(template, parts):
    assert ChatTemplate(template).dialect.parts is parts


def test_both_formats_take_strings_and_parts():
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "three"}]
    assert render(PARTS, messages) == "[user](text:one)(text:two)[assistant](text:three)"
    assert "user\none\ntwo<|im_end|>" in render(CHATML, messages)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        ["hello"],
        [{"content": "no role"}],
        [{"role": "king", "content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "poem", "text": "x"}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": ["f"]}],
    ],
)
def test_what_is_no_message_is_refused(messages):
    with pytest.raises(RequestError) as raised:
        render(CHATML, messages)
    assert raised.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_request_error(template):
    with pytest.raises(RequestError, match="chat template"):
        render(template, TALK)


def test_messages_are_not_changed():
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    before = copy.deepcopy(messages)
    normalize(messages[0], Dialect())
    render(CHATML, messages)
    assert messages == before


def test_bad_syntax():
    with pytest.raises(jinja2.TemplateSyntaxError):
        ChatTemplate("{% for %}")


def test_where_templates_are_looked_for(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert find_template(tmp_path, {}) is None
    assert find_template(tmp_path, {"chat_template": "C"}) == "C"
    assert find_template(tmp_path, {"chat_template": named}) == "D"
    assert find_template(tmp_path, {"chat_template": named}, tools=True) == "T"
    assert find_template(tmp_path, {"chat_template": named[:1]}, tools=True) == "D"
    with pytest.raises(ModelError, match="list of names"):
        find_template(tmp_path, {"chat_template": [1]})
    (tmp_path / "chat_template.jinja").write_text("F")
    assert find_template(tmp_path, {"chat_template": named}) == "F"
    (tmp_path / "mine.jinja").write_text("M")
    assert find_template(tmp_path, {}, str(tmp_path / "mine.jinja")) == "M"
    assert find_template(tmp_path, {}, "{{ messages }}") == "{{ messages }}"
    for name in ("nowhere.jinja", "a\0b", "~no such user/x", str(tmp_path)):
        with pytest.raises(ConfigError, match="no readable file"):
            find_template(tmp_path, {}, name)


# Content as string or parts, null, or missing ------------------------------------------------------------------------

LOOP = "{% for p in m.content %}{{ p.text }}{% endfor %}"
EITHER = "{% if m.content is string %}{{ m.content | trim }}{% else %}" + LOOP + "{% endif %}"
MIXED = {
    "system trimmed": "{% set s = messages[0].content | trim %}<S>{{ s }}{% for m in messages[1:] %}<{{ m.role }}>"
    + EITHER
    + "{% endfor %}",
    "system concatenated": "{{ messages[0].content + '|' }}{% for m in messages[1:] %}" + EITHER + "{% endfor %}",
    "a branch for strings": "{% for m in messages %}" + EITHER + "{% endfor %}",
    "not string": "{% for m in messages %}{% if m.content is not string %}" + LOOP + "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "split": "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% else %}"
    + EITHER
    + "{% endif %};{% endfor %}",
    "tested for what it begins with": "{% for m in messages %}{% if m.content.startswith(' Be') %}S{% endif %}" + EITHER + "{% endfor %}",
    "first letter": "{% for m in messages %}{{ m.content[0] }}{{ m.content[:4] }}" + EITHER + "{% endfor %}",
    "by a macro": "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{{ m.content | length }}{% endfor %}",
    "JSON": "{% for m in messages %}{{ m.content | tojson }}{% if m.content is string %}{% else %}" + LOOP + "{% endif %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_strings_stay_strings_where_templates_know_both(name):
    messages = [SYSTEM, TALK[0], {"role": "assistant", "content": "<think>x</think>a"}, TALK[2]]
    assert render(MIXED[name], messages) == oracle(MIXED[name], messages)


@pytest.mark.parametrize("item", ["m.content[0].text", "m.content[0]['text']", "(m.content | first).text"])
def test_strings_are_parts_to_templates_that_know_only_parts(item):
    """And may be strings elsewhere in the same template; transformers writes nothing for these."""
    loops = "{{ messages[0].content | trim }}{% for m in messages %}" + LOOP + "{{ " + item + " }};{% endfor %}"
    assert render(loops, [{"role": "user", "content": "hi "}]) == "hihi hi ;"


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
ASKS = {
    "is none": "{% for m in messages %}{% if m['content'] is none %}<{{ m.tool_calls[0].function.name }}>"
    "{% elif m['content'] is not none %}{{ m['content'] }}{% endif %}{% endfor %}",
    "== none": "{% for m in messages %}{% if m.content == none %}<call>{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "by a variable": "{% for m in messages %}{% set c = m.content %}{% if c is not none %}{{ c }}{% else %}<call>{% endif %}{% endfor %}",
    "by get": "{% for m in messages %}{% if m.get('content') is none %}<call>{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "is defined": "{% for m in messages %}{% if m.content is defined %}[{{ m.content or '' }}]{% endif %}{% endfor %}",
    "in": "{% for m in messages %}{% if 'content' in m %}[{{ m.content or '' }}]{% endif %}{% endfor %}",
    "default": "{% for m in messages %}[{{ m.content | default('none', true) }}]{% endfor %}",
}


@pytest.mark.parametrize("name", ["is none", "== none", "by a variable", "by get"])
def test_null_contents_are_null_to_templates_that_ask(name):
    """As in transformers, but for its releases that leave null out: with those the calls are lost."""
    messages = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert render(ASKS[name], messages) == TALK[1]["content"] + ("<f>" if name == "is none" else "<call>")


@pytest.mark.parametrize("name", ["is defined", "in", "default"])
@pytest.mark.parametrize("content", [{}, {"content": None}], ids=["missing", "null"])
def test_missing_contents_are_missing_to_templates_that_ask(name, content):
    messages = [TALK[0], {"role": "assistant", "tool_calls": [CALL], **content}]
    assert render(ASKS[name], messages) == oracle(ASKS[name], messages)


def test_null_contents_are_empty_elsewhere():
    messages = [{"role": "user", "content": None}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert render("{% for m in messages %}[{{ m.content }}]{% endfor %}", messages) == "[][]"
    assert render(ASKS["is none"], messages[:1]) == "", "only who answers may have said nothing"
    assert render("{% for m in messages %}<" + LOOP + ">{% endfor %}", messages) == "<><>"


# Roles, tool calls, reasoning ----------------------------------------------------------------------------------------

KNOWN = "{% for m in messages %}{% if m.role in ['system', 'developer'] %}<{{ m.role }}>{% endif %}{{ m.content }}{% endfor %}"
TABLED = "{% set names = {'developer': 'D', 'user': 'U'} %}{% for m in messages %}{{ names[m.role] }}{% endfor %}"
QWEN = "{% for m in messages %}{% if m.role == 'system' %}S:{{ m.content }}{% elif m.role == 'user' %}U:{{ m.content }}{% endif %}{% endfor %}"


def test_developers_are_systems_where_templates_do_not_know_them():
    messages = [{"role": "developer", "content": "Be brief."}, TALK[2]]
    assert render(QWEN, messages) == "S:Be brief.U:Tell me more"
    assert render(CHATML, messages, add_generation_prompt=False).startswith("<|im_start|>system\nBe brief.")
    assert render(KNOWN, messages) == "<developer>Be brief.Tell me more"
    assert render(TABLED, messages) == "DU"
    as_parts = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, TALK[2]]
    assert render(QWEN, as_parts) == "S:Be brief.U:Tell me more"
    assert render(QWEN, [TALK[2], messages[0]]) == "U:Tell me moreS:Be brief."
    assert render("{{ 'developer' }}" + QWEN, messages).endswith("S:Be brief.U:Tell me more"), "not as a role"


def test_functions_are_tools_where_templates_do_not_know_them():
    messages = [{"role": "function", "name": "f", "content": "4"}]
    assert (
        render("{% for m in messages %}{% if m['role'] == 'tool' %}T{{ m.content }}{% endif %}{% endfor %}", messages)
        == "T4"
    )
    assert render("{% for m in messages %}{% if m['role'] == 'function' %}F{% endif %}{% endfor %}", messages) == "F"


ITEMS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("arguments", ["", "  ", "null", " null ", "{}", None, "missing", {}])
def test_calls_without_arguments_have_none(arguments):
    function = {"name": "now"} if arguments == "missing" else {"name": "now", "arguments": arguments}
    assert render(ITEMS, [{"role": "assistant", "tool_calls": [{"function": function}]}]) == ""
    given = [{"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": '{"a": {"b": [1]}}'}}]}]
    assert render(ITEMS, given) == "a={'b': [1]};"


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "f", "arguments": '{"a":' * 100_000 + "1" + "}" * 100_000}},
        {"function": {"name": "f", "arguments": "[" * 100_000}},
        {"function": {"name": "f", "arguments": "9" * 10_000}},
        {"function": "f"},
    ],
    ids=lambda call: str(call)[:40],
)
def test_what_is_no_call_is_refused(call):
    for calls in ([call], "f", 3, {"a": 1}):
        with pytest.raises(RequestError) as raised:
            render(CHATML, [{"role": "assistant", "content": None, "tool_calls": calls}])
        assert raised.value.param == "messages"


def test_arguments_that_are_nested_too_deeply_to_be_written_are_refused():
    nested: dict = {}
    for _ in range(5000):
        nested = {"a": nested}
    with pytest.raises(RequestError, match="chat template failed"):
        render(CHATML, [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": nested}}]}])


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_no_key(calls):
    messages = [TALK[0], {"role": "assistant", "content": "yes", "tool_calls": calls}, TALK[2]]
    assert render(LLAMA3, messages) == render(LLAMA3, [TALK[0], TALK[1] | {"content": "yes"}, TALK[2]])


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name(name):
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}{% endfor %}"
    messages = [{"role": "assistant", "content": "a", name: "because"}]
    assert render(template, messages) == oracle(template, messages) == "because|because|a"


# Continuing ----------------------------------------------------------------------------------------------------------

STRIPS = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1].strip() }}</{{ m.role }}>{% endfor %}"
SHOUTS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
FORGETS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "end", ["i", "im", "end", "e", "<", "|>", ">", "\n", "x\n ", "assistant", "<|im_end|>", "End_of_final_message_0"]
)
@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3, GEMMA, STRIPS, PARTS], ids=["chatml", "llama3", "gemma", "strips", "parts"]
)
def test_a_short_last_message_is_continued_where_it_ends(template, end):
    messages = [{"role": "user", "content": f"say {end} End_of_final_message_1"}, {"role": "assistant", "content": end}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    if not end.strip():
        with pytest.raises(RequestError, match="empty"):
            render(template, messages, **options)
        return
    got = render(template, messages, **options)
    assert got == (oracle(template, messages, continue_final_message=True) if template != PARTS else got)
    whole = render(template, messages, add_generation_prompt=False)
    assert whole.startswith(got)
    assert got.rstrip().endswith(end.strip())
    assert "End_of" not in whole[len(got) :]


def test_the_last_part_of_the_last_message_is_continued():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "e"}]
    messages = [TALK[0], {"role": "assistant", "content": parts}]
    for template, said in ((PARTS, "(text:one)(text:e"), (CHATML, "one\ne")):
        got = render(template, messages, add_generation_prompt=False, continue_final_message=True)
        assert got.endswith(said)


@pytest.mark.parametrize("template", [SHOUTS, FORGETS])
def test_a_template_that_writes_something_else_is_told(template):
    """Also where an earlier message quotes the last."""
    messages = [{"role": "user", "content": "say yes"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(RequestError, match="does not write the last message as it is") as raised:
        render(template, messages, add_generation_prompt=False, continue_final_message=True)
    assert raised.value.param == "continue_final_message"


# Files and scopes ----------------------------------------------------------------------------------------------------


def test_generation_blocks_have_a_scope_of_their_own():
    inside = "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}"
    assert render(inside, TALK) == oracle(inside, TALK)
    unset = inside.removeprefix("{% set x = 1 %}")
    assert render(unset, TALK) == oracle(unset, TALK)


def test_templates_in_a_folder(tmp_path):
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("T")
    (folder / "rag.jinja").write_text("R")
    assert find_template(tmp_path, {}, tools=True) == "T"
    assert find_template(tmp_path, {}, tools=False) is None
    assert find_template(tmp_path, {"chat_template": "C"}, tools=False) == "C"
    (tmp_path / "chat_template.jinja").write_text("D")
    listed = {"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}
    assert find_template(tmp_path, listed, tools=True) == "T"
    assert find_template(tmp_path, listed, tools=False) == "D"


def test_the_template_of_a_processor(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": "P"}')
    assert find_template(tmp_path, {}) == "P"
    assert find_template(tmp_path, {"chat_template": "C"}) == "C"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"chat_template": 5}, "must be a string or a list"),
        ({"chat_template": {"default": "x"}}, "must be a string or a list"),
        ({"chat_template": [{"name": ["x"], "template": "y"}]}, "must be a string or a list of names"),
        ({"chat_template": [{"name": "default", "template": None}]}, "must be a string or a list of names"),
    ],
)
def test_what_is_no_template_is_named(config, says, tmp_path):
    with pytest.raises(ModelError, match=f"tokenizer_config.json {says}"):
        find_template(tmp_path, config)


def test_templates_that_cannot_be_read_are_named(tmp_path):
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ModelError, match=r"chat_template.jinja cannot be read as UTF-8"):
        find_template(tmp_path, {})
    with file.open("wb") as opened:
        opened.truncate(1 << 40)
    with pytest.raises(ModelError, match="at most"):
        find_template(tmp_path, {})
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ModelError, match="not a regular file"):
        find_template(tmp_path, {})
