"""Jinja for templates that nobody here has read: what they do is counted, and refused before it gets out of hand.

Jinja's sandbox keeps a template from reaching out; it lets it loop for ever and fill the memory. Here a rendering has a
number of steps: one for each round of a loop and each call, and one more for every few characters, elements or parts of
the template that it goes through or makes. The count depends on template and messages alone, never on the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sized
from typing import Any, cast

from jinja2 import TemplateSyntaxError, nodes, pass_context
from jinja2.environment import Environment
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer

#: Steps of a rendering: at least, for every character given, for every pair of messages, and at most (seconds).
LEAST_STEPS, PER_CHARACTER, PER_PAIR, MOST_STEPS = 250_000, 0.5, 4, 3_000_000
#: Characters, elements, and nodes of the template's syntax tree that are one step.
CHARACTERS, ELEMENTS, NODES = 16, 4, 16
#: Characters of a template, bits of a whole number, and the largest whole number that calls and filters take.
MOST_SOURCE, MOST_BITS, MOST_NUMBER = 1 << 17, 4096, 100_000
#: Under this name, which no template can write, the variables of a rendering hold its budget.
BUDGET = " budget"
#: Filters and globals that make much of little, and are of no use to a chat template.
DROPPED = ("urlize", "pprint", "xmlattr", "lipsum")
COMPARING = ("in", "eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan")


class Budget:
    """The steps that a rendering has left. SecurityError when they are used up."""

    def __init__(self, characters: int = 0, messages: int = 0):
        asked = LEAST_STEPS + int(characters * PER_CHARACTER) + messages * messages * PER_PAIR
        self.left = min(asked, max(MOST_STEPS, int(characters * PER_CHARACTER)))

    def spend(self, steps: int) -> None:
        self.left -= max(1, steps)
        if self.left < 0:
            raise SecurityError("it takes more steps than a chat template needs: it loops, or repeats text, too often")

    def look_at(self, value: Any) -> None:
        """Spend what it takes to go through the length of ``value``."""
        self.spend(_length(value))

    def go_through(self, value: Any) -> None:
        """Spend what it takes to write or to compare all of ``value``, whose parts may be the same ones many times."""
        if not isinstance(value, list | tuple | dict | set):
            return self.look_at(value)
        waiting = [value]
        while waiting:
            part = waiting.pop()
            self.look_at(part)
            if isinstance(part, list | tuple | dict | set):
                self.spend(len(part))
                waiting.extend(part)
                waiting.extend(part.values() if isinstance(part, dict) else ())
        return None


def _length(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value) // CHARACTERS
    return len(value) // ELEMENTS if isinstance(value, list | tuple | dict | set) else 0


def budget_of(context: Context) -> Budget:
    return cast(Budget, context.resolve_or_missing(BUDGET))


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates, as transformers has it (trimmed blocks, ``tojson``, ``generation``), bounded.

    ``from_string`` raises TemplateSyntaxError for all that is no template; what is rendered needs a ``Budget`` among
    its variables, under ``BUDGET``.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))  # type: ignore[misc]  # of the class, as Jinja has it

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationBlock],
            finalize=_go_through,
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded(name, call) for name, call in self.filters.items() if name not in DROPPED}
        self.filters |= {"spend ": _spend, "look at ": _look_at, "go through ": _go_through}
        self.tests |= {name: _compared(cast(Any, self.tests[name])) for name in COMPARING}
        self.globals = {name: value for name, value in self.globals.items() if name not in DROPPED}

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        if len(source) > MOST_SOURCE:
            raise TemplateSyntaxError(f"it has {len(source)} characters, and at most {MOST_SOURCE} are read", 1)
        try:
            return super().from_string(source, *args, **kwargs)
        except (RecursionError, SyntaxError, ValueError, MemoryError, OverflowError) as error:
            raise TemplateSyntaxError(f"it cannot be compiled ({type(error).__name__}: {error})", 1) from error

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(cast(nodes.Template, _Counting(self).visit(source)), *args, **kwargs)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(__context)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        known = isinstance(owner, str | int | bytes | list | tuple | dict)
        _before(budget, name if known else "", owner, *args, **kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.look_at(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @pass_context
        def bounded(context: Context, *args: Any, **kwargs: Any) -> str:
            _before_format(budget_of(context), value.__self__, *args, **kwargs)
            return wrapped(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = budget_of(context)
        if isinstance(left, int) and isinstance(right, int):
            bits = (left.bit_length() + right.bit_length()) if operator != "**" else left.bit_length() * abs(right)
            if bits > MOST_BITS:
                raise SecurityError(f"{operator} makes a number of more than {MOST_BITS} bits")
        elif operator == "*":
            times, many = (left, right) if isinstance(left, int) else (right, left)
            budget.spend(_length(many) * times if isinstance(times, int) and isinstance(many, Sized) else 1)
            budget.spend(times // CHARACTERS if isinstance(times, int) and isinstance(many, Sized) else 1)
        elif operator == "%" and isinstance(left, str):
            _before_format(budget, left, *(right if isinstance(right, tuple) else (right,)))
        else:
            budget.look_at(left)
            budget.look_at(right)
        return super().call_binop(context, operator, left, right)


class GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what training learns from; for a prompt it is its content, with
    a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's protocol)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Callable[[], str]) -> str:
        return caller()


# ------------------------------------------------------------------------------------------- before work is done


def _before(budget: Budget, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Spend what the filter or method ``name`` of ``value`` is going to take, with these arguments."""
    given = [*args, *kwargs.values()]
    if name in SIZED and any(isinstance(number, int) and abs(number) > MOST_NUMBER for number in given):
        raise SecurityError(f"{name} takes whole numbers up to {MOST_NUMBER}")
    for part in (value, *given):
        budget.look_at(part)
    if name in BEFORE:
        BEFORE[name](budget, value, *args, **kwargs)


def _before_replace(budget: Budget, text: Any, old: Any = "", new: Any = "", *args: Any, **kwargs: Any) -> None:
    if isinstance(text, str):
        found = text.count(str(old)) if str(old) else len(text) + 1
        budget.spend(found * (len(str(new)) + 1) // CHARACTERS)


def _before_join(budget: Budget, one: Any, other: Any = "", *args: Any, **kwargs: Any) -> None:
    """Of the filter and of the method: which is the separator is told by the types."""
    between, items = (one, other) if isinstance(one, str) and not isinstance(other, str) else (other, one)
    budget.go_through(items)
    budget.spend(len(items) * len(str(between)) // CHARACTERS if isinstance(items, Sized) else 1)


def _before_format(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    """Every field may write the longest argument, or be as wide as a number says, of the text or among them."""
    given, text, before = [*args, *kwargs.values()], str(text), budget.left
    for value in given:
        budget.go_through(value)
    widths = [int(digits[:9]) for digits in re.findall(r"\d+", text)]
    if re.search(r"\*|\{[^}]*\{", text):
        widths += [value for value in given if isinstance(value, int)]
    if (widest := max(widths, default=0)) > MOST_NUMBER:
        raise SecurityError(f"a field of a format has at most {MOST_NUMBER} characters")
    budget.spend((text.count("%") + text.count("{")) * (before - budget.left + widest // CHARACTERS))


def _before_indent(budget: Budget, text: Any, width: Any = 4, *args: Any, **kwargs: Any) -> None:
    size = len(width) if isinstance(width, str) else width
    budget.spend((str(text).count("\n") + 1) * int(size) // CHARACTERS)


def _before_wrap(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    between = max((len(value) for value in (*args, *kwargs.values()) if isinstance(value, str)), default=1)
    budget.spend(len(str(text)) * between // CHARACTERS)


def _before_tabs(budget: Budget, text: str, size: int = 8) -> None:
    budget.spend(text.count("\t") * size // CHARACTERS)


def _before_sum(budget: Budget, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("sum adds numbers only")


def _before_all(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    for part in (value, *args, *kwargs.values()):
        budget.go_through(part)


def _refuse(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    raise SecurityError("translate is not supported")


#: Filters and methods that make as much as a number among their arguments says.
SIZED = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "to_bytes", "tojson")
)
#: By the names of filters and methods: those that make much of little, or go through all of what they get.
BEFORE: Mapping[str, Callable[..., None]] = {
    "replace": _before_replace,
    "join": _before_join,
    "indent": _before_indent,
    "wordwrap": _before_wrap,
    "format": _before_format,
    "expandtabs": _before_tabs,
    "translate": _refuse,
    **dict.fromkeys(("tojson", "string", "sort", "unique", "min", "max", "count", "index", "dictsort"), _before_all),
    "sum": _before_sum,
}


def _bounded(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """``filter``, which spends what it takes. Its context keeps Jinja from working it out while compiling."""
    passed = {
        _PassArg.context: lambda context: (context,),
        _PassArg.eval_context: lambda context: (context.eval_ctx,),
        _PassArg.environment: lambda context: (context.environment,),
    }.get(cast(_PassArg, _PassArg.from_obj(filter)), lambda context: ())

    @pass_context
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(context)
        if name == "join" and not isinstance(value, Sized):
            value = list(value)
        _before(budget, name, value, *args, **kwargs)
        result = filter(*passed(context), value, *args, **kwargs)
        if name in ("batch", "slice"):
            result = list(result)
            budget.go_through([len(part) * [0] for part in result])
        budget.look_at(result)
        return result

    return bounded


def _compared(test: Callable[..., Any]) -> Callable[..., Any]:
    @pass_context
    def compared(context: Context, value: Any, *args: Any) -> Any:
        _before_all(budget_of(context), value, *args)
        return test(value, *args)

    return compared


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes characters for HTML."""
    options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "separators": separators, "sort_keys": sort_keys}
    if indent is None:
        return json.dumps(value, **options)
    budget, pieces = budget_of(context), []
    for piece in json.JSONEncoder(indent=indent, **options).iterencode(value):
        budget.look_at(piece)
        pieces.append(piece)
    return "".join(pieces)


@pass_context
def _spend(context: Context, steps: int) -> bool:
    budget_of(context).spend(steps)
    return True


@pass_context
def _look_at(context: Context, value: Any) -> Any:
    budget_of(context).look_at(value)
    return value


@pass_context
def _go_through(context: Context, value: Any) -> Any:
    budget_of(context).go_through(value)
    return value


class _Counting(NodeTransformer):
    """Puts the counting into a template: into what may run more than once, and into what no hook of Jinja's sees."""

    def __init__(self, environment: Environment):
        self.environment = environment

    def _filter(self, node: nodes.Expr, name: str) -> nodes.Expr:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self.environment)

    def _round(self, node: Any) -> nodes.Expr:
        """Spends what once through ``node`` takes."""
        every = list(node.find_all(nodes.Node))
        text = sum(len(part.data) for part in every if isinstance(part, nodes.TemplateData))
        steps = nodes.Const(1 + len(every) // NODES + text // (4 * CHARACTERS), lineno=node.lineno)
        return self._filter(steps, "spend ")

    def _body(self, node: Any) -> Any:
        spend = self._round(node)
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(spend, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is None:
            return cast(nodes.Node, self._body(node))
        spend = self._round(node)
        node = cast(nodes.For, self.generic_visit(node))
        node.test = nodes.And(spend, cast(nodes.Expr, node.test), lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = cast(nodes.Concat, self.generic_visit(node))
        node.nodes = [self._filter(part, "go through ") for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node = cast(nodes.Compare, self.generic_visit(node))
        owners: list[Any] = [node, *node.ops]
        for owner in owners:
            if not isinstance(owner.expr, nodes.Const):
                owner.expr = self._filter(owner.expr, "go through ")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node = cast(nodes.Getitem, self.generic_visit(node))
        if isinstance(node.arg, nodes.Slice):
            node.node = self._filter(node.node, "look at ")
        return node
