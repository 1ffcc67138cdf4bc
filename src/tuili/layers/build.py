"""``Build``: what constructors of layers are given beside their shapes."""

from __future__ import annotations

from dataclasses import dataclass

from tuili.ops import REFERENCE, Kernels


@dataclass(frozen=True)
class Build:
    """``kernels`` are whose a model computes with, for good."""

    kernels: Kernels


#: Of a model that torch's references compute.
REFERENCES = Build(REFERENCE)
