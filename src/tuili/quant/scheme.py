"""``Scheme``: which numbers a weight is made of. Plain data, no torch: planners price schemes too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tuili.base.errors import ConfigError, nearest

#: Inputs that may share a scale of a 4-bit weight.
GROUPS = (32, 64, 128)
#: Formats store whole tiles of this many outputs.
TILE = 16
#: Side of the blocks of FP8 weights that share a scale.
BLOCK = 128
#: A decoder's matrices between tokens and vectors. Four bits cost most there, and a small part of the bytes.
TABLES = ("embedding", "head")


@dataclass(frozen=True)
class Scheme:
    """``format``: the numbers, dense (floats), int8, int4 or fp8 (E4M3).

    ``group``: inputs that share a scale (0: all of a row's); ``height``: outputs that share it too (1, or BLOCK);
    ``symmetric``: no zero points; ``weight_only``: activations stay floats, instead of being rounded per row (fp8: to
    fp8, else to int8). ``wide_scales``: int4's scales are float32, because float16 would change them. ``table``: the
    numbers of the embedding and the head, where they are others. ``dtype``: of dense floats ("": the activations').
    """

    format: str = "dense"
    group: int = 0
    symmetric: bool = True
    weight_only: bool = False
    height: int = 1
    wide_scales: bool = False
    table: str = ""
    dtype: str = ""

    def __str__(self) -> str:
        """As ``int4 g32 zeros``."""
        size = f"{self.height}x{self.group}" if self.height > 1 else f"g{self.group}" if self.group else ""
        parts = (
            self.dtype or self.format,
            size,
            "" if self.symmetric else "zeros",
            "weight-only" if self.weight_only else "",
        )
        return " ".join(part for part in parts if part)

    def of(self, module: str) -> Scheme:
        """The scheme of a decoder's matrix ``module``."""
        if not self.table or module not in TABLES:
            return self
        return Scheme(self.table, weight_only=self.weight_only)


#: What ``--quantization`` may be. int8, int4 and fp8 round the activations too (W8A8, W4A8).
SCHEMES = {
    "none": Scheme(),
    "int8": Scheme("int8"),
    "int8_weight_only": Scheme("int8", weight_only=True),
    "int4": Scheme("int4", GROUPS[0], table="int8"),
    "int4_weight_only": Scheme("int4", GROUPS[0], weight_only=True, table="int8"),
    "fp8": Scheme("fp8"),
    "fp8_weight_only": Scheme("fp8", weight_only=True),
}


def scheme_of(quantization: str, group: int | None = None, dtype: str = "") -> Scheme:
    """The scheme of ``--quantization``, ``--quantization-group-size`` and ``--dtype``. ConfigError for what does not go
    together."""
    if quantization not in SCHEMES:
        raise ConfigError(f"--quantization cannot be {quantization!r}.{nearest(quantization, SCHEMES)}")
    scheme = SCHEMES[quantization]
    if scheme.format == "dense":
        scheme = replace(scheme, dtype=dtype)
    if group is None or group == scheme.group:
        return scheme
    if not scheme.group:
        raise ConfigError(
            f"--quantization-group-size {group} needs --quantization int4 or int4_weight_only, not {quantization}: "
            "its scales are not per group"
        )
    if group not in GROUPS:
        raise ConfigError(f"--quantization-group-size must be one of {', '.join(map(str, GROUPS))}, got {group}")
    return replace(scheme, group=group)
