# ruff: noqa: E501 (a template is a line)
"""What a chat template may do is bounded; what real ones do stays within the bounds, to the letter as in Jinja."""

from __future__ import annotations

import json
import time
import tracemalloc

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tuili.base.errors import RequestError
from tuili.engine.chat import ChatTemplate, compiled
from tuili.engine.sandbox import BUDGET, MOST_SOURCE, Budget, Sandbox

USER = [{"role": "user", "content": "hi"}]
DOUBLE = "{% set n = namespace(x=SEED) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
NEST = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
BIG = "{% set big = 'a' * 100000 %}"
HOSTILE = {
    "loops": "{% for x in range(9999) %}" * 3 + "x" + "{% endfor %}" * 3,
    "silent loops": "{% for x in range(9999) %}" * 3 + "{% set y = x %}" + "{% endfor %}" * 3,
    "loops that filter": "{% for x in range(9999) %}" * 2 + "{% for y in range(9999) if false %}{% endfor %}" + "{% endfor %}" * 2,
    "recursive loop": "{% for x in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}",
    "macros": "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(90) }}",
    "calls": "{% macro g(n) %}{% if n %}{{ caller() }}{{ caller() }}{% endif %}{% endmacro %}{% macro f(n) %}{% call g(n) %}{{ f(n - 1) }}{% endcall %}{% endmacro %}{{ f(60) }}",
    "blocks": "{% block a scoped %}{% for i in range(2) %}{{ self.a() }}{% endfor %}{% endblock %}",
    "long body": "{% for x in range(99999) %}" + "{% set y = 1 %}" * 5_000 + "{% endfor %}",
    "long text": "{% for x in range(99999) %}" + "y" * 100_000 + "{% endfor %}",
    "repeated string": "{{ 'a' * 1000000000 }}",
    "repeated list": "{{ ([1] * 1000000000) | length }}",
    "repeated left": "{{ 1000000000 * 'a' }}",
    "power": "{{ 10 ** 10000000000 }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "doubled string": DOUBLE.replace("SEED", "'ab'"),
    "doubled list": DOUBLE.replace("SEED", "[1]"),
    "joined with ~": DOUBLE.replace("SEED", "'ab'").replace("n.x + n.x", "n.x ~ n.x"),
    "set block": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "nested list written": NEST + "{{ n.x }}",
    "nested list as JSON": NEST + "{{ n.x | tojson }}",
    "nested list as indented JSON": NEST + "{{ n.x | tojson(indent=2) }}",
    "nested lists compared": NEST + "{% set y = n.x %}" + NEST + "{{ n.x == y }}",
    "nested list joined": NEST + "{{ n.x | join(',') }}",
    "nested list formatted": NEST + "{{ '%s' % (n.x,) }}",
    "nested list to a string": NEST + "{{ n.x | string | length }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "center by name": "{{ ['a'] | map('center', 1000000000) | list }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\t' * 10000).expandtabs(99999) }}",
    "indent": BIG + "{{ ('\n' * 100000) | indent(big) }}",
    "indent by a number": "{{ 'a\nb' | indent(1000000000) }}",
    "wordwrap": BIG + "{{ big | wordwrap(1, wrapstring=big) }}",
    "replace": BIG + "{{ big | replace('a', big) }}",
    "replace method": BIG + "{{ big.replace('a', big) }}",
    "replace nothing": BIG + "{{ big.replace('', big) }}",
    "join": BIG + "{{ range(99999) | join(big) }}",
    "join method": BIG + "{{ big.join(big) }}",
    "join of a generator": BIG + "{{ ([big] * 90000) | select | join }}",
    "format": BIG + "{{ ('%s' * 10000) % (([big] * 10000) | list) }}",
    "format of a tuple": BIG + "{% set f = '%(a)s' * 10000 %}{{ f % {'a': big} }}",
    "format filter": BIG + "{{ ('%(a)s' * 10000) | format(a=big) }}",
    "format method": BIG + "{{ ('{0}' * 10000).format(big) }}",
    "format_map method": BIG + "{{ ('{a}' * 10000).format_map({'a': big}) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format width method": "{{ '{:1000000000}'.format(1) }}",
    "format width argument": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format star": "{{ '%*d' % (1000000000, 1) }}",
    "many wide fields": "{{ ('{0:99999}' * 20000).format(1) }}",
    "translate": BIG + "{{ big.translate({97: big}) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list | length }}",
    "slice": "{{ [1] | slice(1000000000) | list | length }}",
    "many small lists": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + [range(99999) | batch(1) | list] %}{% endfor %}",
    "kept lists": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + [range(99999) | list] %}{% endfor %}",
    "slices": BIG + "{% for i in range(99999) %}{% for j in range(99) %}{% set y = big[1:] %}{% endfor %}{% endfor %}",
    "search": BIG + "{% for i in range(99999) %}{% for j in range(99) %}{% set y = 'b' in big %}{% endfor %}{% endfor %}",
    "search by a test": BIG + "{% for i in range(99999) %}{% for j in range(99) %}{% set y = 'b' is in big %}{% endfor %}{% endfor %}",
    "counting": BIG + "{% for i in range(99999) %}{% for j in range(99) %}{% set y = big.count('b') %}{% endfor %}{% endfor %}",
    "sums of lists": "{{ (range(99999) | batch(1) | list) | sum(start=[]) | length }}",
    "steps given back": "{{ [-1000000000] | map('spend ') | list }}" + "{% for x in range(9999) %}" * 3 + "{% endfor %}" * 3,
    "range": "{% for x in range(1000000000) %}{% endfor %}",
    "depth": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}  # fmt: skip


#: Those that only take time: watching their memory takes several times as long.
WORKING = ("loops", "silent loops", "loops that filter", "macros", "long body", "steps given back")


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_not_end_is_refused_at_once(name: str) -> None:
    template = ChatTemplate(HOSTILE[name])
    start = time.process_time()
    with pytest.raises(RequestError, match="the chat template failed"):
        template.render(USER)
    assert time.process_time() - start < 10
    if name in WORKING:
        return
    tracemalloc.start()
    with pytest.raises(RequestError, match="the chat template failed"):
        template.render(USER)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300 << 20


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' | center(100000000) | center(100000000) }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 2 ** 10000000000 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ [1] * 1000000000 }}",
        "{{ range(99999) | list | tojson }}" * 20,
    ],
)
def test_nothing_is_worked_out_while_compiling(source: str) -> None:
    tracemalloc.start()
    ChatTemplate(source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{% if x %}" * 3000 + "{% endif %}" * 3000,
        "{% for x in y %}" * 30 + "{% endfor %}" * 30,
        "{{ 1" + " + 1" * 20_000 + " }}",
        "{{ 'a' | urlize }}",
        "{{ " + "9" * 5000 + " }}",
        "{% block a %}{% endblock %}{% block a %}{% endblock %}",
        "x" * (MOST_SOURCE + 1),
    ],
    ids=lambda source: source[:20],
)
def test_what_cannot_be_compiled_is_no_template(source: str) -> None:
    with pytest.raises(jinja2.TemplateError):
        ChatTemplate(source)


#: All that chat templates do, and what is counted on the way.
TOUR = """
{%- macro show(value, depth=0) -%}
  {%- if value is mapping -%}{ {%- for k, v in value | dictsort %}{{ k }}:{{ show(v, depth + 1) }}{{ ',' if not loop.last }}{% endfor -%} }
  {%- elif value is string -%}'{{ value | replace("'", '"') }}'
  {%- elif value is iterable -%}[{% for v in value %}{{ show(v, depth=depth + 1) }};{% endfor %}]
  {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(count=0, last='', big=2147483648) -%}
{%- for m in messages if m.role != 'nobody' -%}
  {%- set ns.count = ns.count + 1 -%}
  {%- set ns.last = ns.last ~ m.role ~ loop.index0 -%}
  <{{ m['role'] + '|' }}{{ m.content | trim | upper }}|{{ m.content.split('</think>')[-1].lstrip('\\n') }}|{{ loop.last }}
  {%- if loop.changed(m.role) %}!{% endif -%}{{ loop.cycle('a', 'b') }}{{ m.content[:3] }}{{ m.content[1:-1] }}>
{%- else -%}none{%- endfor -%}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' + ') }}
{{ messages[1:] | length }}{{ messages[::-1] | map(attribute='role') | list | unique | join }}
{{ show(tools) }}{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ tools[0].function.name is in ['f', 'g'] }}
{{ '%s-%05d' % ('x', 42) }}{{ '{}:{:>6}'.format('k', 7) }}{{ "%s!" | format('y') }}{{ 'a\\nb' | indent(2, true) }}
{{ [3, 1, 2] | sort | first }}{{ (1, 2) + (3,) }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ '=' * 10 }}{{ [0] * 3 }}
{{ ns.count > 1 and ns.last != 'x' and 'user' in ns.last and ns.big == 2147483648 }}{{ ns.big + 1 }}
{{ messages | groupby('role') | map('first') | list }}{{ [1, 2, 3, 4, 5] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}
{{ [1, 2] | sum }}{{ 'x y z' | wordcount }}{{ 'hello world' | wordwrap(5) }}{{ 'abc' | center(9) }}{{ none | default('d', true) }}
{{ [[1, 2], [3]] | map('join', '-') | join('/') }}{{ ['b', 'A'] | sort(case_sensitive=true) }}{{ {'a': 1}.items() | list }}
{%- set text %}block {{ 1 }}{% endset -%}{{ text }}{% filter upper %}shout{% endfilter %}
{%- call(x) show_with() -%}[{{ x }}]{%- endcall -%}
"""
TOUR = "{%- macro show_with() -%}{{ caller('c') }}{%- endmacro -%}" + TOUR


def test_the_same_text_as_without_bounds() -> None:
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"maximum": 10**12, "é<": [1.5, None, True]}}}
    ]
    messages = [
        {"role": r, "content": c} for r, c in (("user", "<think>x</think>\n hé "), ("assistant", "yes"), ("user", "q"))
    ]
    free = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    free.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    given = {"messages": messages, "tools": tools}
    assert Sandbox().from_string(TOUR).render({**given, BUDGET: Budget()}) == free.from_string(TOUR).render(given)


def test_long_chats_of_large_messages_have_steps_enough() -> None:
    """A thousand messages through what templates do to each, and a template that looks back from each to all others."""
    source = (
        "{% for m in messages %}{% set c = m.content | trim %}{% set ns = namespace(n=0) %}"
        "{% for other in messages[loop.index:] %}{% if other.role == 'tool' %}{% set ns.n = 1 %}{% endif %}{% endfor %}"
        "{{ '<|im_start|>' + m.role + '\n' + (c.split('</think>')[-1]).lstrip() + '<|im_end|>' }}{% endfor %}"
    )
    messages = [{"role": "user" if i % 2 else "assistant", "content": f"{i} " + "words " * 300} for i in range(1000)]
    assert len(ChatTemplate(source).render(messages)) > 1_800_000
    one = [{"role": "user", "content": "x" * 20_000_000}]
    assert (
        len(ChatTemplate("{% for m in messages %}" + "{{ m.content }}{{ m.content | trim }}{% endfor %}").render(one))
        == 40_000_000
    )


def test_the_budget_does_not_outlive_a_rendering() -> None:
    template = compiled("{% for x in range(9999) %}{{ x }}{% endfor %}")
    texts = {template.render(USER) for _ in range(40)}
    assert len(texts) == 1
