"""The instruction sets that kernels are compiled for, and those of them that this machine has."""

from __future__ import annotations

from tuili.base.errors import ConfigError
from tuili.ops import cpu

EVERY = ("avx512", "avxvnni", "avx2")


def runs(isa: str) -> bool:
    """Whether the kernels compiled for ``isa`` run here."""
    try:
        cpu.use_isa(isa)
    except ConfigError:
        return False
    cpu.use_isa("")
    return True


#: Cases are made of these alone: thousands that cannot run would take as long to be skipped as others to run.
ISAS = [isa for isa in EVERY if runs(isa)]
