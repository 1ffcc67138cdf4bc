"""What a chat template expects of messages, read from its syntax tree: strings or parts, null or "", which roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import nodes

#: Roles that few templates know, and what they are to the others: OpenAI's newer name, and its older.
OTHER_ROLES = {"developer": "system", "function": "tool"}


@dataclass(frozen=True)
class Dialect:
    """``parts``: it loops over contents, and takes lists of parts. ``tests_strings``: it asks which of the two it has.

    ``asks_none``, ``asks_defined``: it tells a content that is null, or missing, from an empty one. ``roles``: those of
    ``OTHER_ROLES`` that it knows.
    """

    parts: bool = False
    tests_strings: bool = False
    asks_none: bool = False
    asks_defined: bool = False
    roles: frozenset[str] = frozenset()


def read_dialect(tree: nodes.Template) -> Dialect:
    names = {"content"} | set(_aliases(tree))
    tests = {test.name for test in tree.find_all(nodes.Test) if _is_content(test.node, names)}
    compared = [operands for operands in _compared(tree) if any(_is_content(node, names) for node in operands)]
    return Dialect(
        parts=any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)),
        tests_strings="string" in tests,
        asks_none="none" in tests or any(_holds(node, None) for operands in compared for node in operands),
        asks_defined=bool(tests & {"defined", "undefined"}) or _looks_for_content(tree, names),
        roles=frozenset(role for role in OTHER_ROLES if _knows(tree, role)),
    )


def _aliases(tree: nodes.Template) -> Iterator[str]:
    """Variables that are set to a message's content."""
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, set()):
            yield assign.target.name


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    return _is_key(node, "content") or (isinstance(node, nodes.Name) and node.name in names)


def _is_key(node: nodes.Node, key: str) -> bool:
    """Whether it is a message's ``key``, by attribute, item or ``get``."""
    if isinstance(node, nodes.Getattr):
        return node.attr == key
    if isinstance(node, nodes.Getitem):
        return _holds(node.arg, key)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
        return bool(node.args) and _holds(node.args[0], key)
    return False


def _holds(node: nodes.Node, value: str | None) -> bool:
    return isinstance(node, nodes.Const) and node.value == value and type(node.value) is type(value)


def _compared(tree: nodes.Template) -> Iterator[list[nodes.Node]]:
    for compare in tree.find_all(nodes.Compare):
        yield [compare.expr, *(operand.expr for operand in compare.ops)]


def _looks_for_content(tree: nodes.Template, names: set[str]) -> bool:
    """Whether it asks ``'content' in message``, or has a default where there is none."""
    defaults = (f for f in tree.find_all(nodes.Filter) if f.name in ("default", "d") and f.node is not None)
    return any(_holds(operands[0], "content") for operands in _compared(tree)) or any(
        _is_content(filter.node, names) for filter in defaults if filter.node is not None
    )


def _knows(tree: nodes.Template, role: str) -> bool:
    """Whether it compares a role with ``role``, or looks it up in a table of its own."""
    keys = (pair.key for pair in tree.find_all(nodes.Pair))
    return any(_holds(key, role) for key in keys) or any(
        any(_names_role(node) for node in operands)
        and any(_holds(const, role) for node in operands for const in (node, *node.find_all(nodes.Const)))
        for operands in _compared(tree)
    )


def _names_role(node: nodes.Node) -> bool:
    return _is_key(node, "role") or (isinstance(node, nodes.Name) and "role" in node.name)
