"""What kernels need beyond Triton's language, and what Triton's interpreter gets wrong, put right in one place.

The interpreter computes with numpy, which has no bfloat16 and no 8-bit floats: it cuts bits off where the hardware
rounds, and multiplies the bit patterns of bfloat16. Under ``INTERPRETED`` the helpers go through float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
#: Added and taken away again, it rounds a float32 below 2**22 to a whole number, ties to even.
ROUNDER = tl.constexpr(12582912.0)


def _allow_ranges() -> None:
    """From numpy 2.4 on, an array of one element is no number any more; Triton 3.6 makes a loop's bounds from such."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


if INTERPRETED:
    _allow_ranges()


@triton.jit
def whole(x):
    """``x`` (float32, below 2**22) to the nearest whole number, ties to even."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def _keep_bits(x, dropped: tl.constexpr):
    """float32 with its last ``dropped`` bits rounded away, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    bits += (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    return ((bits >> dropped) << dropped).to(tl.float32, bitcast=True)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 ``x`` as ``dtype``, to nearest, ties to even."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            x = _keep_bits(x, 16)
        if dtype == tl.float8e4nv:
            # Below 2**-6 numbers are multiples of 2**-9.
            small = (x + ROUNDER / 512) - ROUNDER / 512
            x = tl.where(tl.abs(x) < 0.015625, small, _keep_bits(x, 20))
    return x.to(dtype)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """``x`` of 8 bits (or of ``dtype`` already) as ``dtype``: exact."""
    if x.dtype == dtype:
        return x
    if INTERPRETED:
        return x.to(tl.float32).to(dtype)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` on the tensor cores (float32 operands: in full float32)."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def tanh(x):
    """Within 1e-7 of the hyperbolic tangent."""
    return 1 - 2 / (tl.exp2(2 * LOG2_E * x) + 1)
