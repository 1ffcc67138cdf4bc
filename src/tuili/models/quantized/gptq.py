"""GPTQ (AutoGPTQ, GPTQModel): integers of 4 or 8 bits in groups of inputs, in either version of its file format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuili.models.fields import Fields
from tuili.models.quantized import methods
from tuili.models.quantized.layout import Gptq, Layout, scheme_for
from tuili.models.quantized.patterns import WHERE, NameMatcher
from tuili.models.quantized.settings import groups_of, is_head

#: What each version takes off the zero points.
SHIFTS = {"gptq": 1, "gptq_v2": 0}
#: Lists of modules.
MOST_GROUPS = 100


@methods.register("gptq")
class GPTQ:
    def __init__(self, config: Mapping[str, Any]):
        fields = Fields(config, WHERE)
        self.fields, self.matcher = fields, NameMatcher()
        self.shift = SHIFTS[fields.choice("checkpoint_format", SHIFTS, "gptq")]
        self.head = fields.flag("lm_head")
        own = fields.inside("dynamic")
        self.own = {pattern: own.table(pattern) for pattern in own.config}
        self.members = _members(fields)
        self._held({})

    def layout(self, names: tuple[str, ...], kind: str) -> Layout | None:
        if kind != "Linear" or (is_head(names) and not self.head):
            return None
        for pattern, changes in self.own.items():
            bare = pattern.removeprefix("-:").removeprefix("+:")
            if any(self.matcher.matches(bare, name) for name in names):
                return None if pattern.startswith("-:") else self._held(changes)
        inside = any(name.endswith(f".{member}") for name in names for member in self.members)
        return self._held({}) if inside or not self.members or is_head(names) else None

    def _held(self, changes: Mapping[str, Any]) -> Layout:
        """The layout with the settings that ``dynamic`` changes for a module."""
        fields = Fields({**self.fields.config, **changes}, WHERE)
        bits, grid = fields.integer("bits"), groups_of(fields)
        return Gptq(scheme_for(bits, False, grid, fields.flag("sym", True), True, WHERE), grid, bits, self.shift)


def _members(fields: Fields) -> frozenset[str]:
    """Ends of the names of all modules that are rounded, of lists of them or one list; none: all modules are."""
    key = "modules_in_block_to_quantize"
    groups = fields.config.get(key) or []
    if not isinstance(groups, list) or len(groups) > MOST_GROUPS:
        raise fields.wrong(key, f"a list of at most {MOST_GROUPS} lists of names")
    return frozenset(name for group in groups for name in Fields({key: _list(group)}, fields.where).strings(key))


def _list(group: Any) -> Any:
    return [group] if isinstance(group, str) else group
