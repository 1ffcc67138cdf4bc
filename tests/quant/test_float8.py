"""FP8, E4M3 and E5M2 (INVENTORY 74): torch's codec, and the Triton kernels', are the definition's on all 256 codes.

Micikevicius et al. 2022, arXiv:2209.05433: E4M3 has no infinities, and NaN only where all bits are set.
"""

from __future__ import annotations

import math

import pytest
import torch

from tuili.ops import triton
from tuili.ops.triton import layouts

KINDS = {torch.float8_e4m3fn: (4, 3), torch.float8_e5m2: (5, 2)}


def meaning(code: int, exponents: int, mantissas: int) -> float:
    sign = -1.0 if code >> 7 else 1.0
    exponent, mantissa = code >> mantissas & (1 << exponents) - 1, code & (1 << mantissas) - 1
    top = exponent == (1 << exponents) - 1
    if top and exponents == 5:
        return sign * math.inf if mantissa == 0 else math.nan
    if top and mantissa == (1 << mantissas) - 1:
        return math.nan
    bias = (1 << (exponents - 1)) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissas)
    return sign * (1 + mantissa / (1 << mantissas)) * 2.0 ** (exponent - bias)


def every(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All codes, and what they mean."""
    return torch.arange(256).to(torch.uint8).view(dtype), torch.tensor([meaning(c, *KINDS[dtype]) for c in range(256)])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_all_codes_mean_what_the_definition_says(dtype: torch.dtype) -> None:
    codes, means = every(dtype)
    assert torch.equal(codes.float().nan_to_num(nan=1e9), means.nan_to_num(nan=1e9))
    known = means.isfinite()
    assert torch.equal(means[known].to(dtype).view(torch.uint8), codes.view(torch.uint8)[known])


def test_stored_bytes_mean_their_codes() -> None:
    codes, means = every(layouts.FP8)
    known = means.isfinite()
    scales = torch.full((1, 1), 0.5)
    assert torch.equal(layouts.byte_floats(codes[known].view(2, -1), scales), means[known].view(2, -1) * 0.5)


@pytest.mark.skipif(not triton.describe().usable, reason=triton.describe().why)
def test_kernels_read_and_round_as_torch_does() -> None:
    """Reading: every finite code. Rounding: every code's neighbours, and the middles between them (ties to even)."""
    from tuili.ops.triton import products, tuning

    codes, means = every(layouts.FP8)
    known = means.isfinite()
    table = codes.view(torch.uint8)[known].view(layouts.FP8)
    padded = torch.zeros(256, 64).to(layouts.FP8)
    padded.view(torch.uint8)[: len(table), 0] = table.view(torch.uint8)
    one = torch.zeros(1, 64)
    one[0, 0] = 1
    tile = tuning.Tile(64, 16, 64, 1, 4, 2)
    read = products.product(one, None, padded, torch.ones(1, 1), None, torch.float32, tile)
    assert torch.equal(read[0, : len(table)], means[known])

    values = means[known].unique()
    middles = (values[1:] + values[:-1]) / 2
    tries = torch.cat((values, middles, torch.nextafter(middles, values[1:]), torch.nextafter(middles, values[:-1])))
    tries = torch.cat((torch.full((1,), 448.0), tries)).unsqueeze(0)  # so that the factor is 1
    have, factors = products.round_rows(tries, layouts.FP8, tries.shape[1])
    assert float(factors) == 1
    assert torch.equal(have.float(), tries.to(layouts.FP8).float())
