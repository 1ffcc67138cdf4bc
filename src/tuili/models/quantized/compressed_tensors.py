"""compressed-tensors (llm-compressor): groups of modules by name or class, each with its numbers and file format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuili.base.log import get
from tuili.models.fields import Fields
from tuili.models.quantized import methods
from tuili.models.quantized.layout import Bytes, Grid, Layout, Packed, scheme_for
from tuili.models.quantized.patterns import WHERE, NameMatcher

log = get(__name__)
#: ``weight_packed``; else ``weight`` with a byte per code.
PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
TYPES, STRATEGIES = ("int", "float"), ("tensor", "channel", "group", "block")


@methods.register("compressed-tensors")
class CompressedTensors:
    def __init__(self, config: Mapping[str, Any]):
        self.fields, self.matcher = Fields(config, WHERE), NameMatcher()
        for part in ("sparsity_config", "transform_config"):
            changes = {k: v for k, v in self.fields.table(part).items() if v and (k, v) != ("format", "dense")}
            if changes.get("format") or changes.get("config_groups"):
                raise self.fields.wrong(part, "none: neither sparse nor rotated weights")
        self.ignore = self.fields.strings("ignore")
        groups = self.fields.inside("config_groups")
        if not groups.config:
            raise self.fields.wrong("config_groups", "a table of at least one group")
        self.groups = [self._group(groups.inside(name)) for name in groups.config]

    def layout(self, names: tuple[str, ...], kind: str) -> Layout | None:
        if any(self._means(pattern, names, kind) for pattern in self.ignore):
            return None
        matching = [
            (_rank(target), number, layout)
            for number, (targets, layout) in enumerate(self.groups)
            for target in targets
            if self._means(target, names, kind)
        ]
        return min(matching, key=lambda found: found[:2])[2] if matching else None

    def _means(self, target: str, names: tuple[str, ...], kind: str) -> bool:
        """Whether ``target`` (a class, a module's name, or ``re:`` and a pattern for the name's beginning) means it."""
        self.matcher.spend(1)
        if target.startswith("re:"):
            return any(self.matcher.matches(target[3:], name) for name in names)
        return target == kind or target in names

    def _group(self, fields: Fields) -> tuple[list[str], Layout | None]:
        weights = fields.inside("weights")
        if not weights.config:
            return fields.strings("targets"), None
        floating = weights.choice("type", TYPES, "int") == "float"
        bits, symmetric, grid = weights.integer("num_bits"), weights.flag("symmetric", True), _grid(weights)
        weight_only = self._weight_only(fields, floating)
        scheme = scheme_for(bits, floating, grid, symmetric, weight_only, weights.where)
        if self._format(fields, floating, weight_only) == PACKED:
            return fields.strings("targets"), Packed(scheme, grid, bits)
        return fields.strings("targets"), Bytes(scheme, grid)

    def _format(self, group: Fields, floating: bool, weight_only: bool) -> str:
        """The group's own, the file's, or what the library makes of such numbers."""
        default = "float-quantized" if floating else PACKED if weight_only else "int-quantized"
        own = group.config.get("format")
        named = (group if own else self.fields).choice("format", FORMATS, default)
        return default if named == "naive-quantized" else named

    def _weight_only(self, group: Fields, floating: bool) -> bool:
        """Whether activations stay floats. Rounded ones must be of 8 bits, as the weights' kind."""
        if group.config.get("output_activations"):
            raise group.wrong("output_activations", "null: only what goes into a product is rounded")
        inputs = group.inside("input_activations")
        if not inputs.config:
            return True
        kind = "float" if floating else "int"
        if inputs.integer("num_bits") != 8 or inputs.choice("type", TYPES, "int") != kind:
            raise group.wrong("input_activations", "8 bits of the weights' type, or null")
        if not inputs.config.get("dynamic"):
            log.info("%s: activations are rounded row by row, by their own range; the files' is not used", inputs.where)
        return False


def _grid(weights: Fields) -> Grid:
    group = weights.config.get("group_size")
    channel = type(group) is int and group == -1
    strategy = weights.choice("strategy", STRATEGIES, "tensor" if group is None else "channel" if channel else "group")
    if strategy == "group":
        return Grid(1, weights.integer("group_size"))
    if strategy != "block":
        return Grid(0 if strategy == "tensor" else 1, 0)
    block = weights.config.get("block_structure")
    if not isinstance(block, list) or len(block) != 2:
        raise weights.wrong("block_structure", "a list of two sizes such as [128, 128]")
    height, width = (Fields({"block_structure": size}, weights.where).integer("block_structure") for size in block)
    return Grid(height, width)


def _rank(target: str) -> int:
    """Which target wins where several match: a name, a pattern, a class."""
    return 1 if target.startswith("re:") else 2 if "." not in target and target[:1].isupper() else 0
