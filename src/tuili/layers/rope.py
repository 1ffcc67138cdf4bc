"""Rotary angles for positions: one ``Rope`` per distinct setting of a model, looked up once per forward.

The tables are made once, for the longest sequence that the engine was started for, and never change. Dynamic NTK and
longrope choose their frequencies by sequence length; transformers re-chooses while a sequence grows, so that keys that
are already cached keep angles of another setting, and the text depends on how the prompt was cut. Here ``max_len``
chooses, for all positions: up to the original length nothing is stretched and the result is exactly the trained
model's; started for more, every sequence, short ones too, uses the stretched frequencies (law 5; vLLM does likewise).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tuili.base.errors import ModelError
from tuili.layers.spec import RopeSpec
from tuili.ops import REFERENCE, Kernels

Angles = tuple[torch.Tensor, torch.Tensor]


def frequencies(spec: RopeSpec, max_len: int = 0) -> torch.Tensor:
    """Angle per position of each rotated pair, float32 [dim / 2], for sequences of up to ``max_len`` tokens."""
    if spec.kind not in KINDS:
        raise ModelError(f"rope scaling {spec.kind!r} is not known; known: {', '.join(KINDS)}")
    return KINDS[spec.kind](spec, dict(spec.scaling), max_len)


def amplitude(spec: RopeSpec) -> float:
    """What yarn and longrope multiply cos and sin by, to keep attention's temperature over longer contexts."""
    scaling: dict[str, Any] = dict(spec.scaling)
    if spec.kind not in ("yarn", "longrope") or (factor := scaling["factor"]) <= 1:
        return scaling.get("attention_factor", 1.0)
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    if spec.kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(spec.original_len))
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return _mscale(factor, scaling["mscale"]) / _mscale(factor, scaling["mscale_all_dim"])
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _powers(spec: RopeSpec, theta: float) -> torch.Tensor:
    """Positions per radian of each pair: ``theta ** (2i / dim)``."""
    return theta ** (torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim)


def _default(spec: RopeSpec, scaling: dict[str, Any], max_len: int) -> torch.Tensor:
    return 1.0 / _powers(spec, spec.theta)


def _linear(spec: RopeSpec, scaling: dict[str, Any], max_len: int) -> torch.Tensor:
    """Positions squeezed by ``factor`` (Chen et al. 2023, arXiv:2306.15595)."""
    return _default(spec, scaling, max_len) / scaling["factor"]


def _dynamic(spec: RopeSpec, scaling: dict[str, Any], max_len: int) -> torch.Tensor:
    """The base grows so that the slowest pair spans ``max_len`` (NTK-aware; reddit.com/r/LocalLLaMA, 2023)."""
    factor, length = scaling["factor"], max(max_len, spec.original_len)
    grown = spec.theta * (factor * length / spec.original_len - (factor - 1)) ** (spec.dim / (spec.dim - 2))
    return 1.0 / _powers(spec, grown)


def _llama3(spec: RopeSpec, scaling: dict[str, Any], max_len: int) -> torch.Tensor:
    """Slow pairs squeezed, fast ones kept, a linear blend between (Llama 3.1, arXiv:2407.21783)."""
    plain = _default(spec, scaling, max_len)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = spec.original_len * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / scaling["factor"] + keep * plain


def _yarn(spec: RopeSpec, scaling: dict[str, Any], max_len: int) -> torch.Tensor:
    """Pairs blended by how often they turn in the original length (Peng et al. 2023, arXiv:2309.00071)."""
    plain = _default(spec, scaling, max_len)

    def pair(turns: float) -> float:
        """The (fractional) pair that turns so often."""
        return spec.dim * math.log(spec.original_len / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = pair(scaling["beta_fast"]), pair(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    span = high - low or 0.001
    squeeze = ((torch.arange(spec.dim // 2).float() - low) / span).clamp(0, 1)
    return plain / scaling["factor"] * squeeze + plain * (1 - squeeze)


def _longrope(spec: RopeSpec, scaling: dict[str, Any], max_len: int) -> torch.Tensor:
    """Searched factors per pair, one set up to the original length, one beyond (Ding et al. 2024, arXiv:2402.13753)."""
    factors = scaling["long_factor" if max_len > spec.original_len else "short_factor"]
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _powers(spec, spec.theta))


KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


class Rope:
    """cos and sin of every position up to ``max_len``, float32 [max_len, dim / 2]."""

    def __init__(self, spec: RopeSpec, max_len: int, device: torch.device | str = "cpu", kernels: Kernels = REFERENCE):
        angle = torch.outer(torch.arange(max_len).float(), frequencies(spec, max_len))
        scale = amplitude(spec)
        self.cos, self.sin = (angle.cos() * scale).to(device), (angle.sin() * scale).to(device)
        self.kernels = kernels

    def at(self, positions: torch.Tensor) -> Angles:
        """cos, sin for ``positions`` [n]: each [n, dim / 2]."""
        return self.kernels.embedding(self.cos, positions), self.kernels.embedding(self.sin, positions)
