"""Learning rate over a run: warm up, stay, decay to zero ("WSD", Hu et al. 2024, arXiv:2404.06395).

The middle is flat, so a run can be stopped early or prolonged, and the decay follows steps or the clock alike.
"""

from __future__ import annotations


def factor(step: int, progress: float, warmup_steps: int, decay: float) -> float:
    """Share of the peak rate. ``step`` counts from 0; ``progress`` and ``decay`` are shares of the run, in [0, 1]."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    left = max(0.0, 1.0 - progress)
    return warm * (min(1.0, left / decay) if decay else 1.0)
