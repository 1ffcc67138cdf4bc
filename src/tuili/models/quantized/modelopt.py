"""NVIDIA's ModelOpt: FP8 with a scale for all of a matrix, or for each output. github.com/NVIDIA/Model-Optimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuili.base.log import get
from tuili.models.fields import Fields
from tuili.models.quantized import methods
from tuili.models.quantized.layout import Bytes, Grid, Layout, scheme_for
from tuili.models.quantized.patterns import WHERE, NameMatcher

log = get(__name__)
#: How many outputs share a scale.
ALGORITHMS = {"FP8": Grid(0, 0), "FP8_PER_CHANNEL_PER_TOKEN": Grid(1, 0)}


@methods.register("modelopt")
class ModelOpt:
    def __init__(self, config: Mapping[str, Any]):
        fields, self.matcher = Fields(config, WHERE), NameMatcher()
        grid = ALGORITHMS[fields.choice("quant_algo", ALGORITHMS)]
        if config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme"):
            log.info("%s: its type of the KV cache is not taken over; --kv-cache-dtype sets it", WHERE)
        # A name is left out where one of these describes all of it, or names parts of it: * stands for anything.
        entries = [entry for key in ("exclude_modules", "ignore") for entry in fields.strings(key) if entry]
        self.kept = [rf"(?:.*\.)?{re.escape(entry).replace(chr(92) + '*', '.*')}(?:\..*)?$" for entry in entries]
        self.held = Bytes(scheme_for(8, True, grid, True, False, WHERE), grid)

    def layout(self, names: tuple[str, ...], kind: str) -> Layout | None:
        kept = any(self.matcher.matches(pattern, name) for pattern in self.kept for name in names)
        return None if kind != "Linear" or kept else self.held
