"""Whether the Triton kernels run here, and on what. Imports Triton only if it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

#: The two backends of the op table.
FAST, INVARIANT = "triton", "triton_invariant"
#: Multiprocessors that the interpreter pretends to have: few, so that small tests split their work too.
INTERPRETED_PROCESSORS = 4
#: Versions of Triton whose interpreter runs the kernels; 3.9's does not find a tensor in a helper of a helper.
INTERPRETERS = ((3, 6),)


@dataclass(frozen=True)
class TritonSupport:
    """``usable``: kernels run; ``interpreted``: on the CPU, slowly, for tests. ``why`` not, where they do not."""

    usable: bool
    interpreted: bool = False
    card: str = ""
    why: str = ""


@cache
def describe() -> TritonSupport:
    """Looked up once: Triton decides when it is imported whether it interprets."""
    try:
        import triton
    except ImportError as error:
        return TritonSupport(False, why=f"Triton is not installed ({error}): pip install 'tuili[gpu]'")
    if triton.knobs.runtime.interpret:
        return _interpreted(triton.__version__)
    if not torch.cuda.is_available():
        return TritonSupport(False, why="no CUDA device (set TRITON_INTERPRET=1 to test the kernels on a CPU, slowly)")
    return TritonSupport(True, card=torch.cuda.get_device_name())


def _interpreted(version: str) -> TritonSupport:
    numbers = tuple(int(n) for n in version.split(".")[:2])
    if numbers in INTERPRETERS:
        return TritonSupport(True, interpreted=True)
    known = ", ".join(".".join(map(str, n)) for n in INTERPRETERS)
    return TritonSupport(False, why=f"Triton {version}'s interpreter was not tried or fails; the tests take {known}")


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``: how much work a launch must have to fill it."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
