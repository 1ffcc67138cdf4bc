"""Tuili (推理): makes large language models cheaper to run, and proves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from tuili.core.params import SamplingParams
    from tuili.engine.llm import LLM


def __getattr__(name: str) -> Any:
    """``LLM`` and ``SamplingParams`` on demand, so that ``import tuili`` costs nothing and needs no torch."""
    if name == "LLM":
        from tuili.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from tuili.core.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'tuili' has no attribute {name!r}")
