"""``quant_method: fp8`` (DeepSeek, transformers, vLLM): float8 in blocks of 128 x 128, or with one scale for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuili.base.log import get
from tuili.models.fields import Fields
from tuili.models.quantized import methods
from tuili.models.quantized.layout import ByteLayout, Grid, Layout, scheme_for
from tuili.models.quantized.patterns import WHERE
from tuili.models.quantized.settings import is_head, left_out
from tuili.quant.scheme import BLOCK

log = get(__name__)


@methods.register("fp8")
class FP8:
    def __init__(self, config: Mapping[str, Any]):
        fields = Fields(config, WHERE)
        fields.choice("fmt", ("e4m3",), "e4m3")
        if fields.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static":
            log.info("activation_scheme='static': activations are rounded row by row, by their own range instead")
        block = config.get("weight_block_size")
        if block is not None and block != [BLOCK, BLOCK]:
            raise fields.wrong("weight_block_size", f"[{BLOCK}, {BLOCK}] or null")
        grid = Grid(*block) if block else Grid(0, 0)
        self.kept = left_out(fields, "modules_to_not_convert", "ignored_layers")
        scheme = scheme_for(8, True, grid, True, False, fields.where)
        self.held = ByteLayout(scheme, grid, "weight_scale_inv" if block else "weight_scale")

    def layout(self, names: tuple[str, ...], kind: str) -> Layout | None:
        return None if kind != "Linear" or is_head(names) or self.kept(names) else self.held
