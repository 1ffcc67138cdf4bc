"""GPTQ (AutoGPTQ, GPTQModel): integers of 4 or 8 bits in groups of inputs, in either version of its file format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuili.models.fields import Fields
from tuili.models.quantized import methods
from tuili.models.quantized.layout import Gptq, Layout, scheme_for
from tuili.models.quantized.settings import WHERE, groups_of, is_head, matches

#: What each version takes off the zero points.
SHIFTS = {"gptq": 1, "gptq_v2": 0}


@methods.register("gptq")
class GPTQ:
    def __init__(self, config: Mapping[str, Any]):
        fields = Fields(config, WHERE)
        self.config = config
        if (config.get("checkpoint_format") or "gptq") not in SHIFTS:
            raise fields.wrong("checkpoint_format", "'gptq' or 'gptq_v2'")
        self.shift = SHIFTS[config.get("checkpoint_format") or "gptq"]
        self.head = fields.flag("lm_head")
        self.own = fields.table("dynamic")
        self.blocks = config.get("modules_in_block_to_quantize")
        self._held({})

    def layout(self, names: tuple[str, ...], kind: str) -> Layout | None:
        if kind != "Linear" or (is_head(names) and not self.head):
            return None
        for pattern, changes in self.own.items():
            skips = pattern.startswith("-:")
            if any(matches(pattern.removeprefix("-:").removeprefix("+:"), name) for name in names):
                return None if skips else self._held(changes or {})
        if self.blocks and not is_head(names):
            inside = {member for group in self.blocks for member in ([group] if isinstance(group, str) else group)}
            if not any(name.endswith(f".{member}") for name in names for member in inside):
                return None
        return self._held({})

    def _held(self, changes: Mapping[str, Any]) -> Layout:
        """The layout with the settings that ``dynamic`` changes for a module."""
        fields = Fields({**self.config, **changes}, WHERE)
        bits, grid = fields.integer("bits"), groups_of(fields)
        return Gptq(scheme_for(bits, False, grid, fields.flag("sym", True), True, WHERE), grid, bits, self.shift)
