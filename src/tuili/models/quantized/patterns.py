"""Patterns of module names, as quantization configs hold them: matched without going back, so that none can hang.

A node of the parsed expression maps the places where it may begin to those where it may end, so that the steps are
about ``nodes x len(name)`` for any pattern; Python's ``re`` needs exponentially many for some.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tuili.base.errors import ModelError
from tuili.models.fields import shown

#: Python's own parser of expressions: (name of the node, its content) for each part of a sequence.
_parser: Any = importlib.import_module("re._parser")
#: Characters of a pattern, and steps that all patterns of a checkpoint may take on all its modules: a few seconds.
LONGEST, MOST_STEPS = 1000, 5_000_000


class NameMatcher:
    """Matches patterns with names until ``left`` steps are used up."""

    def __init__(self, left: int = MOST_STEPS):
        self.left = left

    def matches(self, pattern: str, name: str) -> bool:
        """Whether ``name`` begins with what ``pattern`` describes, as ``re.match`` says.

        ModelError for a pattern that is none, and where they are too much work.
        """
        return bool(_compiled(pattern)(_Text(name, self), frozenset((0,))))

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise ModelError(f"{WHERE}: its patterns take too long to match; write fewer or simpler ones")


@dataclass(frozen=True)
class _Text:
    name: str
    matcher: NameMatcher


WHERE = "config.json: quantization_config"
Places = frozenset[int]
Step = Callable[[_Text, Places], Places]


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Step:
    try:
        if len(pattern) > LONGEST:
            raise ValueError(f"it has {len(pattern)} characters, and at most {LONGEST} are read")
        tree = _parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE:
            raise ValueError("flags are not supported")
        return _sequence(tree)
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise ModelError(f"{WHERE}: {shown(pattern)} is no regular expression: {error}") from error


def _sequence(parts: Iterable[tuple[Any, Any]]) -> Step:
    steps = [_step(str(kind), content) for kind, content in parts]

    def follow(text: _Text, places: Places) -> Places:
        for step in steps:
            text.matcher.spend(len(places) + 1)
            places = step(text, places)
            if not places:
                break
        return places

    return follow


def _step(kind: str, content: Any) -> Step:
    if kind == "BRANCH":
        ways = [_sequence(way) for way in content[1]]
        return lambda text, places: frozenset().union(*(way(text, places) for way in ways))
    if kind == "SUBPATTERN" and not content[1] and not content[2]:
        return _sequence(content[3])
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        return _repeat(content[0], content[1], _sequence(content[2]))
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _assert(kind == "ASSERT", content[0] < 0, _sequence(content[1]))
    if kind == "AT":
        return _at(str(content))
    accepts = _character(kind, content)
    return lambda text, places: frozenset(at + 1 for at in places if at < len(text.name) and accepts(text.name[at]))


def _repeat(least: int, most: int, body: Step) -> Step:
    def repeat(text: _Text, places: Places) -> Places:
        for _ in range(least):
            before, places = places, body(text, places)
            if places == before:  # however often it is repeated, it stays here
                break
        found, fresh, count = places, places, least
        while fresh and count < most:
            count, fresh = count + 1, body(text, fresh) - found
            found |= fresh
        return found

    return repeat


def _assert(wanted: bool, behind: bool, inner: Step) -> Step:
    def holds(text: _Text, at: int) -> bool:
        if not behind:
            return bool(inner(text, frozenset((at,))))
        return at in inner(_Text(text.name[:at], text.matcher), frozenset(range(at + 1)))

    return lambda text, places: frozenset(at for at in places if holds(text, at) == wanted)


def _at(where: str) -> Step:
    if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return lambda text, places: places & {0}
    if where in ("AT_END", "AT_END_STRING"):
        return lambda text, places: places & {len(text.name)}
    if where in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
        return lambda text, places: frozenset(at for at in places if _edge(text.name, at) == (where == "AT_BOUNDARY"))
    raise ValueError(f"{where} is not supported")


def _edge(name: str, at: int) -> bool:
    """Whether a word begins or ends at ``at``."""
    inside = [bool(re.fullmatch(r"\w", char)) for char in name[max(0, at - 1) : at + 1]]
    return inside[0] != inside[1] if 0 < at < len(name) else any(inside)


def _character(kind: str, content: Any) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return lambda char: ord(char) == content
    if kind == "NOT_LITERAL":
        return lambda char: ord(char) != content
    if kind == "ANY":
        return lambda char: char != "\n"
    if kind == "RANGE":
        return lambda char: content[0] <= ord(char) <= content[1]
    if kind == "CATEGORY":
        name, category = str(content).removeprefix("CATEGORY_"), {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}
        known = category[name.removeprefix("NOT_")]
        return lambda char: bool(re.fullmatch(known, char)) != name.startswith("NOT_")
    if kind == "IN":
        negated = str(content[0][0]) == "NEGATE"
        members = [_character(str(kind), inner) for kind, inner in content[negated:]]
        return lambda char: any(member(char) for member in members) != negated
    raise ValueError(f"{kind} is not supported")
