"""JSON on the wire: in (strict: what two parsers could read differently is refused) and out, whole or as SSE events.

In: UTF-8 only, no NaN or Infinity, no duplicate keys, no lone surrogates, bounded depth and number of values; every
fault is a RequestError. Work is linear in the body's size, and a body that takes long is parsed in slices, between
which the event loop serves others: a thread would not help, since the C parser keeps the interpreter's lock.
Out: one ``json`` encoder for all; U+0085, U+2028 and U+2029 are escaped because some clients split lines at them.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import math
import re
import time
from collections.abc import Callable, Generator
from typing import Any, NoReturn, TypeVar

from tuili.base.errors import RequestError

T = TypeVar("T")
#: Nesting that a request body may have: tool schemas are deep, attacks are deeper.
MAX_DEPTH = 100
#: Values that a body may have; numbers that stand together in a list weigh an eighth.
MAX_VALUES = 1 << 16
_WEIGHT = 8
#: Bodies up to this size (bytes) are parsed at once: the worst of them takes some milliseconds.
INLINE_BYTES = 32 << 10
#: What a slice of a larger body may take.
SLICE_SECONDS = 0.005
#: Values between two looks at the clock, and the largest piece of a string that is read between them.
_PAUSE_VALUES = 128
_PIECE = 1 << 18

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LOW_SURROGATE = re.compile(r"\\u[dD][c-fC-F]")
_SPACE = re.compile(r"[ \t\n\r]+")
_NUMBERS = re.compile(r"[-+.0-9eE, \t\n\r]{64,32768}")

DONE = b"data: [DONE]\n\n"


# ------------------------------------------------------------------------------------------------------------------ out


def dumps(content: Any) -> bytes:
    text = _encode(content)
    if not text.isascii():
        text = _LINE_ENDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text.encode("utf-8", "backslashreplace")


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(content) + b"\n\n"


class Envelopes(dict[int, tuple[bytes, bytes]]):
    """Events of each choice that differ in one string only: the rest is written once. ``make`` gives a choice's event
    with GAP where the string belongs."""

    GAP = "\0gap"

    def __init__(self, make: Callable[[int], Any]):
        self.make = make

    def __missing__(self, index: int) -> tuple[bytes, bytes]:
        before, after = event(self.make(index)).split(dumps(self.GAP))
        self[index] = before, after
        return before, after

    def event(self, index: int, text: str) -> bytes:
        before, after = self[index]
        return before + dumps(text) + after


# ------------------------------------------------------------------------------------------------------------------- in


async def loads(raw: bytes, turn: asyncio.Lock) -> dict[str, Any]:
    """The object in a request body; of large ones one is read at a time, by ``turn``.

    Raises RequestError, with ``param`` where one field is at fault.
    """
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        if len(raw) <= INLINE_BYTES:
            value = _decoder.decode(text)
        else:
            async with turn:
                value = await in_slices(SlowReader(text).document())
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # integers with more digits than Python converts
        raise RequestError(f"the body holds a number that is too large: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {_kind(value)}")
    if len(raw) <= INLINE_BYTES:
        _check_depth(raw, value)
        if _SURROGATE.search(raw):
            _check_surrogates(value)
    return value


async def in_slices(work: Generator[None, None, T]) -> T:
    """The result of ``work``, which yields where it may be paused; the event loop runs in between."""
    try:
        while True:
            end = time.perf_counter() + SLICE_SECONDS
            while time.perf_counter() < end:
                next(work)
            await asyncio.sleep(0)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _too_deep() -> RequestError:
    return RequestError(f"the body is nested deeper than {MAX_DEPTH} levels")


def _twice(key: str) -> RequestError:
    return RequestError(f"the key {key[:100]!r} occurs twice in one object", key[:100])


def _half_a_pair(key: str) -> RequestError:
    name = key.encode("ascii", "backslashreplace").decode()[:100]
    return RequestError(f"{name} holds half of a surrogate pair, which is not text", name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        raise _twice(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return value


def _refuse(literal: str) -> NoReturn:
    raise RequestError(f"{literal} is not JSON; numbers must be finite")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise RequestError(f"the number {literal[:40]} is too large")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once  # type: ignore[attr-defined]
_scan_string: Callable[[str, int, bool], tuple[str, int]] = json.decoder.scanstring  # type: ignore[attr-defined]


def _check_depth(raw: bytes, value: Any) -> None:
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]


def _check_surrogates(value: dict[str, Any]) -> None:
    for key, item in value.items():
        try:
            _encode({key: item}).encode()
        except UnicodeEncodeError as error:
            raise _half_a_pair(key) from error


class SlowReader:
    """The same JSON as ``_decoder``'s, read in steps: large strings and lists of numbers go through C in pieces, all
    else value by value. ``document`` is a generator that yields where it may be paused, and returns the value."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0
        self.weight = 0
        self.depth = 0
        self.field = ""  # of the outermost object, for messages

    def document(self) -> Generator[None, None, Any]:
        self._skip()
        value = yield from self._value()
        self._skip()
        if self.at != len(self.text):
            raise self._fault("Extra data")
        return value

    def _fault(self, message: str, offset: int = 0) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self.text, self.at + offset)

    def _skip(self) -> str:
        """Go on to the next character that is no space; that character, or nothing at the end."""
        space = _SPACE.match(self.text, self.at)
        if space is not None:
            self.at = space.end()
        return self.text[self.at : self.at + 1]

    def _value(self) -> Generator[None, None, Any]:
        self.weight += _WEIGHT
        if self.weight > MAX_VALUES * _WEIGHT:
            message = f"the body holds more than {MAX_VALUES} values; send less in one request"
            raise RequestError(f"{self.field}: {message}" if self.field else message, self.field or None)
        if self.weight % (_WEIGHT * _PAUSE_VALUES) < _WEIGHT:
            yield
        char = self.text[self.at : self.at + 1]
        if char == '"':
            short = self._short_string()
            return (yield from self._string()) if short is None else short
        if char not in ("{", "["):
            return self._scalar()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _too_deep()
        self.at += 1
        value = yield from (self._object() if char == "{" else self._array())
        self.at += 1
        self.depth -= 1
        return value

    def _scalar(self) -> Any:
        try:
            value, self.at = _scan(self.text, self.at)
        except StopIteration:
            raise self._fault("Expecting value") from None
        return value

    def _object(self) -> Generator[None, None, dict[str, Any]]:
        found: dict[str, Any] = {}
        char = self._skip()
        while char != "}":
            if char != '"':
                raise self._fault("Expecting property name enclosed in double quotes")
            outermost = self.depth == 1
            self.field = "" if outermost else self.field
            key = self._short_string()
            if key is None:
                key = yield from self._string()
            self.field = key if outermost else self.field
            if key in found:
                raise _twice(key)
            if self._skip() != ":":
                raise self._fault("Expecting ':' delimiter")
            self.at += 1
            self._skip()
            found[key] = yield from self._value()
            char = self._next("}")
        return found

    def _array(self) -> Generator[None, None, list[Any]]:
        found: list[Any] = []
        char = self._skip()
        while char != "]":
            if self._numbers(found):
                yield
            found.append((yield from self._value()))
            char = self._next("]")
        return found

    def _next(self, end: str) -> str:
        """The first character of the next item, or ``end``."""
        char = self._skip()
        if char == ",":
            self.at += 1
            char = self._skip()
            if char == end:
                raise self._fault("Illegal trailing comma before end of " + ("object" if end == "}" else "array"))
        elif char != end:
            raise self._fault("Expecting ',' delimiter")
        return char

    def _numbers(self, found: list[Any]) -> bool:
        """Take a run of numbers up to its last comma, if there is a long one."""
        run = _NUMBERS.match(self.text, self.at)
        end = -1 if run is None else self.text.rfind(",", self.at, run.end())
        if end < 0:
            return False
        try:
            found += _decoder.decode(f"[{self.text[self.at : end]}]")
        except json.JSONDecodeError as error:
            raise self._fault(error.msg, error.pos - 1) from error
        self.weight += self.text.count(",", self.at, end)
        self.at = end + 1
        self._skip()
        return True

    def _short_string(self) -> str | None:
        """A string without escapes, if one begins here and is short."""
        end = self.text.find('"', self.at + 1, self.at + 256)
        if end < 0 or self.text.find("\\", self.at + 1, end) >= 0:
            return None
        try:
            value, self.at = _scan_string(self.text, self.at + 1, True)
        except json.JSONDecodeError as error:
            self.at = error.pos
            raise self._fault(error.msg) from error
        return value

    def _string(self) -> Generator[None, None, str]:
        parts, size, escaped = [], 1024, False
        self.at += 1
        while True:
            end = _piece_end(self.text, self.at, size)
            piece = self.text[self.at : end]
            escaped = escaped or "\\u" in piece
            try:
                value, read = _scan_string(piece + '"', 0, True)
            except json.JSONDecodeError as error:
                raise self._fault(error.msg, error.pos) from error
            parts.append(value)
            if read <= len(piece):
                break
            if end == len(self.text):
                raise self._fault("Unterminated string")
            self.at, size = end, min(size * 8, _PIECE)
            yield
        self.at += read
        whole = "".join(parts)
        if escaped and not _is_text(whole):
            raise _half_a_pair(self.field or whole)
        return whole


def _piece_end(text: str, at: int, size: int) -> int:
    """A place at about ``at + size`` of the string that is read, so that no escape and no surrogate pair is split."""
    end = at + size
    if end >= len(text):
        return len(text)
    last = text.rfind("\\", at, end)
    if last < end - 12:
        return end
    before = text[at : last + 1]
    odd = (len(before) - len(before.rstrip("\\"))) % 2
    end = last if odd else last + 1  # of an even number each escapes its neighbour
    return end - 6 if _LOW_SURROGATE.match(text, end) else end


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
