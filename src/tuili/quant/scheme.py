"""``Scheme``: which numbers a weight is made of. Plain data, no torch: planners price schemes too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """``format`` names the packing (``tuili.quant.formats``).

    ``group``: inputs that share a scale (0: all of a row's); ``symmetric``: no zero points.
    """

    format: str = "dense"
    group: int = 0
    symmetric: bool = True
