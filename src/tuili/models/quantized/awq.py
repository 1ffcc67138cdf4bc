"""AWQ (AutoAWQ's GEMM): 4 bits and zero points in groups of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuili.models.fields import Fields
from tuili.models.quantized import methods
from tuili.models.quantized.layout import Awq, Layout, scheme_for
from tuili.models.quantized.patterns import WHERE
from tuili.models.quantized.settings import groups_of, is_head, left_out


@methods.register("awq")
class AWQ:
    def __init__(self, config: Mapping[str, Any]):
        aliases = {"w_bit": "bits", "q_group_size": "group_size"}
        fields = Fields({aliases.get(key, key): value for key, value in config.items()}, WHERE)
        if fields.text("version", "gemm").lower() != "gemm":
            raise fields.wrong("version", "'gemm'")
        if fields.integer("bits") != 4:
            raise fields.wrong("bits", "4")
        if not fields.flag("zero_point", True):
            raise fields.wrong("zero_point", "true")
        grid = groups_of(fields)
        self.kept = left_out(fields, "modules_to_not_convert", anywhere=True)
        self.held = Awq(scheme_for(4, False, grid, False, True, fields.where), grid)

    def layout(self, names: tuple[str, ...], kind: str) -> Layout | None:
        return None if kind != "Linear" or is_head(names) or self.kept(names) else self.held
