"""Whether the Triton kernels run here, and on what. Imports Triton only if it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

#: The two backends of the op table.
FAST, INVARIANT = "triton", "triton_invariant"
#: Multiprocessors that the interpreter pretends to have: few, so that small tests split their work too.
INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True)
class Description:
    """``usable``: kernels run; ``interpreted``: on the CPU, slowly, for tests. ``why`` not, where they do not."""

    usable: bool
    interpreted: bool = False
    card: str = ""
    why: str = ""


@cache
def describe() -> Description:
    """Looked up once: Triton decides when it is imported whether it interprets."""
    try:
        import triton
    except ImportError as error:
        return Description(False, why=f"Triton is not installed ({error}): pip install 'tuili[gpu]'")
    if triton.knobs.runtime.interpret:
        return Description(True, interpreted=True)
    if not torch.cuda.is_available():
        return Description(False, why="no CUDA device (set TRITON_INTERPRET=1 to test the kernels on a CPU, slowly)")
    return Description(True, card=torch.cuda.get_device_name())


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``: how much work a launch must have to fill it."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
