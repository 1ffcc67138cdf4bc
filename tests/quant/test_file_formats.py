"""Golden words of the file formats, in both directions: the tests' packers write them, Tuili's layouts read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_files import awq_pack, ct_pack, gptq_pack, words

from tuili.models.quantized.layout import Awq, ByteLayout, Gptq, Grid, Packed, scheme_for, unpack_awq, unpack_words
from tuili.quant.scheme import Scheme


def hexes(packed: Any) -> list[str]:
    return [hex(int(word)) for word in np.ravel(packed)]


def golden(*values: int) -> torch.Tensor:
    return words(np.array([values], dtype=np.uint32))


def scheme(bits: int, grid: Grid, symmetric: bool = True) -> Scheme:
    return scheme_for(bits, False, grid, symmetric, True, "test")


def test_compressed_tensors_packs_signed_codes_low_bits_first() -> None:
    codes = np.arange(-8, 8)[None]
    assert hexes(ct_pack(codes, 4)) == ["0x76543210", "0xfedcba98"]
    layout = Packed(scheme(4, Grid(1, 0)), Grid(1, 0))
    files = {"weight_packed": golden(0x76543210, 0xFEDCBA98), "weight_scale": torch.ones(1, 1)}
    found = layout.codes(files, layout.scheme, 1, 16, 0, 1)
    assert found.values.tolist() == [list(range(16))]  # 8 is zero
    assert hexes(ct_pack(np.tile(np.arange(-4, 4), 4)[None], 3)) == ["0x88fac688", "0xc688fac6", "0xfac688fa"]


def test_compressed_tensors_packs_zero_points_along_the_outputs() -> None:
    zeros = [-3, 2, 7, -8, 0, 1, -1, 5]
    assert hexes(ct_pack(np.array([zeros]), 4)) == ["0xd7980fa5"]
    layout = Packed(scheme(4, Grid(1, 32), symmetric=False), Grid(1, 32))
    files = {
        "weight_packed": torch.zeros(8, 4, dtype=torch.int32),
        "weight_scale": torch.ones(8, 1),
        "weight_zero_point": golden(0xD7980FA5),
    }
    found = layout.codes(files, layout.scheme, 8, 32, 0, 8)
    assert found.zeros is not None
    assert (found.zeros.int() - 8).flatten().tolist() == zeros
    part = layout.codes(files, layout.scheme, 8, 32, 3, 5).zeros
    assert part is not None
    assert (part.int() - 8).flatten().tolist() == zeros[3:5]


def test_gptq_packs_along_the_inputs_and_takes_one_off_the_zero_points() -> None:
    assert hexes(gptq_pack(np.arange(16).reshape(8, 2))) == ["0xeca86420", "0xfdb97531"]
    for shift, word in ((1, 0x77777777), (0, 0x88888888)):
        layout = Gptq(scheme(4, Grid(1, 0), symmetric=False), Grid(1, 0), 4, shift)
        files = {"qweight": golden(0xECA86420, 0xFDB97531), "qzeros": golden(word), "scales": torch.ones(1, 2)}
        found = layout.codes(files, layout.scheme, 2, 8, 0, 2)
        assert found.values.T.tolist() == np.arange(16).reshape(8, 2).tolist()
        assert found.zeros is not None
        assert found.zeros.flatten().tolist() == [8, 8]
        Gptq(scheme(4, Grid(1, 0)), Grid(1, 0), 4, shift).check("m", files, 2, 8)  # symmetric: all zero points are 8


def test_awq_packs_columns_in_its_own_order() -> None:
    assert hexes(awq_pack(np.arange(8)[None])) == ["0x75316420"]
    assert unpack_awq(golden(0x75316420)).tolist() == [list(range(8))]
    layout = Awq(scheme(4, Grid(1, 0), symmetric=False), Grid(1, 0))
    files = {"qweight": golden(0x75316420), "qzeros": golden(0x75316420), "scales": torch.ones(1, 8)}
    found = layout.codes(files, layout.scheme, 8, 1, 3, 6)
    assert found.zeros is not None
    assert (found.values.flatten().tolist(), found.zeros.flatten().tolist()) == ([3, 4, 5], [3, 4, 5])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 2**31))
def test_unpacking_undoes_packing(rows: int, columns: int, bits: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (rows, columns))
    packed = words(ct_pack(codes - (1 << (bits - 1)), bits))
    assert np.array_equal(unpack_words(packed, bits, columns).numpy(), codes)
    wide = random.integers(0, 16, (rows, 8 * columns))
    assert np.array_equal(unpack_awq(words(awq_pack(wide))).numpy(), wide)


@pytest.mark.parametrize(
    ("grid", "wanted", "scales"),
    [
        (Grid(0, 0), Scheme("int8"), [[2.0], [2.0]]),
        (Grid(1, 0), Scheme("int8"), [[2.0], [3.0]]),
        (Grid(1, 256), Scheme("int8", 128), [[2.0, 2.0, 3.0], [4.0, 4.0, 5.0]]),
        (Grid(1, 128), Scheme("int8", 128), [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]),
    ],
    ids=str,
)
def test_scales_are_repeated_where_we_keep_more_of_them(grid: Grid, wanted: Scheme, scales: list[list[float]]) -> None:
    count = int(np.prod(grid.shape(2, 384)))
    found = scheme_for(8, False, grid, True, False, "test")
    assert found == wanted
    files = {"weight": torch.zeros(2, 384, dtype=torch.int8), "weight_scale": torch.arange(2.0, 2 + count)}
    assert ByteLayout(found, grid).codes(files, found, 2, 384, 0, 2).scales.tolist() == scales
