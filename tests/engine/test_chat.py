"""Chat templates: transformers' apply_chat_template is the oracle."""

from __future__ import annotations

import copy
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
