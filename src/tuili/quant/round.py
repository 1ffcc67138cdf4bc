"""Rounding to nearest, the plainest algorithm: a matrix's floats become ``Codes``. One function, whoever stores or
multiplies them: loading, algorithms, training with rounded weights and export round alike."""

from __future__ import annotations

import torch

from tuili.ops.rounding import FP8, round_blocks, round_groups
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Codes


def round_to_nearest(matrix: torch.Tensor, scheme: Scheme) -> Codes:
    """``matrix`` [out, into] (floats) in the numbers of ``scheme``.

    int4: per group, with zero points unless symmetric. int8, fp8: symmetric, of each group or block of weights the
    largest is the largest code.
    """
    if scheme.format == "int4":
        return Codes(*round_groups(matrix, scheme.group, scheme.symmetric))
    assert scheme.symmetric, f"{scheme}: rounding to nearest is symmetric"
    dtype = FP8 if scheme.format == "fp8" else torch.int8
    return Codes(*round_blocks(matrix, dtype, scheme.height, scheme.group or matrix.shape[1]))
