"""Bytes on the wire: JSON in (strict: what two parsers could read differently is refused) and JSON and SSE events out.

In: UTF-8 only, no NaN or Infinity, no duplicate keys, no lone surrogates, bounded depth; every fault is a RequestError.
Out: one ``json`` encoder for all; U+0085, U+2028 and U+2029 are escaped because some clients split lines at them.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from tuili.base.errors import RequestError

#: Nesting that a request body may have: tool schemas are deep, attacks are deeper.
MAX_DEPTH = 100

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

DONE = b"data: [DONE]\n\n"


def dumps(content: Any) -> bytes:
    text = _encode(content)
    if not text.isascii():
        text = _LINE_ENDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text.encode("utf-8", "backslashreplace")


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(content) + b"\n\n"


def loads(raw: bytes) -> dict[str, Any]:
    """The object in a request body. Raises RequestError, with ``param`` where one field is at fault."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # integers with more digits than Python converts
        raise RequestError(f"the body holds a number that is too large: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {_kind(value)}")
    _check_depth(raw, value)
    if _SURROGATE.search(raw):
        _check_surrogates(value)
    return value


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RequestError(f"the key {twice[:100]!r} occurs twice in one object", twice[:100])
    return value


def _refuse(literal: str) -> NoReturn:
    raise RequestError(f"{literal} is not JSON; numbers must be finite")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise RequestError(f"the number {literal[:40]} is too large")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)


def _check_depth(raw: bytes, value: Any) -> None:
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels")
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]


def _check_surrogates(value: dict[str, Any]) -> None:
    for key, item in value.items():
        try:
            _encode({key: item}).encode()
        except UnicodeEncodeError as error:
            name = key.encode("ascii", "backslashreplace").decode()[:100]
            raise RequestError(f"{name} holds half of a surrogate pair, which is not text", name) from error
