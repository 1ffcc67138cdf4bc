"""The op table's "triton" backend: kernels for NVIDIA GPUs, in Triton; ``docs/gpu.md`` tells how they work.

``describe()`` says whether they run here. Where they do not, nothing registers, and nothing else of Tuili needs Triton.
"triton_invariant" is the backend of ``--deterministic``: a row's bits do not depend on the batch, the chunks or the
splits (law 5); where the fast kernel is so already, it is registered under both names.
"""

from tuili.ops.triton import layouts  # noqa: F401 (declares its ops)
from tuili.ops.triton.about import FAST, INVARIANT, TritonSupport, describe

if describe().usable:
    from tuili.ops.triton import attention, cache, products, rowwise, sampling  # noqa: F401 (registers them)

__all__ = ["FAST", "INVARIANT", "TritonSupport", "describe"]
