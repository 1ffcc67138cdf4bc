"""Settings that several methods share: which modules stay floats, and the size of groups."""

from __future__ import annotations

import re
from collections.abc import Callable

from tuili.base.errors import ModelError
from tuili.models.fields import Fields
from tuili.models.quantized.layout import Grid

WHERE = "config.json: quantization_config"


def groups_of(fields: Fields) -> Grid:
    """``group_size`` inputs of an output share a scale; -1: all of them."""
    size = fields.config.get("group_size", 128)
    if isinstance(size, bool) or not isinstance(size, int) or size < -1 or size == 0:
        raise fields.wrong("group_size", "-1 or a number of inputs")
    return Grid(1, max(0, size))


def is_head(names: tuple[str, ...]) -> bool:
    return any(name.rsplit(".", 1)[-1] == "lm_head" for name in names)


def left_out(fields: Fields, *keys: str) -> Callable[[tuple[str, ...]], bool]:
    """Whether the lists under ``keys`` name a module: whole parts of its name, or ``re:`` and a pattern."""
    entries = [entry for key in keys for entry in fields.strings(key)]

    def named(names: tuple[str, ...]) -> bool:
        return any(_means(entry, name) for entry in entries for name in names)

    return named


def _means(entry: str, name: str) -> bool:
    return matches(entry[3:], name) if entry.startswith("re:") else f".{entry.strip('.')}." in f".{name}."


def matches(pattern: str, name: str) -> bool:
    """Whether ``name`` begins with what ``pattern`` describes. ModelError for a pattern that is none."""
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ModelError(f"{WHERE}: {pattern!r} is no regular expression: {error}") from error
