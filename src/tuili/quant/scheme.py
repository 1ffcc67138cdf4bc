"""``Scheme``: which numbers a weight is made of. Plain data, no torch: planners price schemes too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tuili.base.errors import ConfigError, nearest

#: Inputs that may share a scale of a 4-bit weight.
GROUPS = (32, 64, 128)
#: Formats store whole tiles of this many outputs.
TILE = 16


@dataclass(frozen=True)
class Scheme:
    """``format`` names the packing (``tuili.quant.formats``).

    ``group``: inputs that share a scale (0: all of a row's); ``symmetric``: no zero points; ``weight_only``:
    activations stay floats, instead of being rounded to int8 per row.
    """

    format: str = "dense"
    group: int = 0
    symmetric: bool = True
    weight_only: bool = False


#: What ``--quantization`` may be. int8 and int4 round the activations to int8 too (W8A8, W4A8).
SCHEMES = {
    "none": Scheme(),
    "int8": Scheme("int8"),
    "int8_weight_only": Scheme("int8", weight_only=True),
    "int4": Scheme("int4", GROUPS[0]),
    "int4_weight_only": Scheme("int4", GROUPS[0], weight_only=True),
}


def scheme_of(quantization: str, group: int | None = None) -> Scheme:
    """The scheme of ``--quantization`` and ``--quantization-group-size``. ConfigError for what does not go together."""
    if quantization not in SCHEMES:
        raise ConfigError(f"--quantization cannot be {quantization!r}.{nearest(quantization, SCHEMES)}")
    scheme = SCHEMES[quantization]
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
