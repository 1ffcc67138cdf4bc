"""Settings that several methods share: which modules stay floats, and the size of groups."""

from __future__ import annotations

import re
from collections.abc import Callable

from tuili.models.fields import Fields
from tuili.models.quantized.layout import Grid
from tuili.models.quantized.patterns import NameMatcher

#: What may follow the part of a name that transformers' patterns describe.
BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def groups_of(fields: Fields) -> Grid:
    """``group_size`` inputs of an output share a scale; -1: all of them."""
    if fields.config.get("group_size") == -1:
        return Grid(1, 0)
    return Grid(1, fields.integer("group_size", 128))


def is_head(names: tuple[str, ...]) -> bool:
    return any(name.rsplit(".", 1)[-1] == "lm_head" for name in names)


def left_out(fields: Fields, *keys: str, anywhere: bool = False) -> Callable[[tuple[str, ...]], bool]:
    """Whether the lists under ``keys`` name a module, as any tool that writes such lists means it.

    An entry is whole parts of a name; its end; a pattern for its beginning, up to the end of a part (transformers);
    ``re:`` and a pattern for its beginning (compressed-tensors); or, with ``anywhere``, any part of it (AutoAWQ).
    """
    entries, matcher = [entry for key in keys for entry in fields.strings(key) if entry], NameMatcher()

    def means(entry: str, name: str) -> bool:
        matcher.spend(1)
        if entry.startswith("re:"):
            return matcher.matches(entry[3:], name)
        if f".{entry.strip('.')}." in f".{name}." or name.endswith(entry) or (anywhere and entry in name):
            return True
        return re.escape(entry) != entry.replace(".", "\\.") and matcher.matches(f"(?:{entry}){BOUNDARY}", name)

    return lambda names: any(means(entry, name) for entry in entries for name in names)
