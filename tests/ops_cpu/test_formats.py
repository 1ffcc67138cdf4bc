"""Every weight format: its matmul means its dequantized matrix, packing loses nothing, rows do not see their batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from isas import ISAS

from tuili import ops
from tuili.base.errors import ConfigError
from tuili.ops import cpu
from tuili.ops.cpu.integer import (
    by_output,
    by_tile,
    int8_linear,
    pack_int4,
    pack_int8,
    round_rows,
    unpack_int4,
    unpack_int8,
)
from tuili.ops.cpu.packed import pack
from tuili.ops.rounding import round_blocks, round_groups
from tuili.quant.formats import formats
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Weight

SCHEMES = [
    Scheme(),
    Scheme("int8"),
    Scheme("int8", weight_only=True),
    *(Scheme("int4", group, symmetric) for group in (32, 64, 128) for symmetric in (True, False)),
    *(Scheme("int4", group, symmetric, weight_only=True) for group, symmetric in ((32, True), (64, False))),
]
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(96, 256), (41, 100), (16, 33)]


def matrix(out: int, into: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backends() -> list[str]:
    return ["reference", "cpu"] if cpu.describe().built else ["reference"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
class TestWeight:
    def test_matmul_means_the_dequantized_matrix(
        self, size: tuple[int, int], dtype: torch.dtype, scheme: Scheme
    ) -> None:
        weight = Weight.of(matrix(*size, dtype), scheme, cpu.Arena())
        x, bias = matrix(9, size[1], dtype, 1), matrix(1, size[0], dtype, 2)[0]
        rounded = x.float()
        if scheme.format != "dense" and not scheme.weight_only:
            codes, factor = round_rows(x)
            rounded = codes * factor
        expected = rounded @ weight.dequant().float().T + bias.float()
        for backend in backends():
            have = replace(weight, kernels=ops.kernels_of(backend)).matmul(x, bias)
            assert have.dtype == dtype
            # In bfloat16 the dequantized weight was itself rounded, by one part in 512.
            loose = 1e-5 if dtype == torch.float32 else 2**-7
            assert float((have.float() - expected).abs().max()) <= loose * float(expected.abs().max())

    def test_rows_are_those_of_the_matrix(self, size: tuple[int, int], dtype: torch.dtype, scheme: Scheme) -> None:
        weight = Weight.of(matrix(*size, dtype), scheme, cpu.Arena())
        ids = torch.tensor([0, size[0] - 1, 7, 7, 3])
        for backend in backends():
            other = replace(weight, kernels=ops.kernels_of(backend))
            assert torch.equal(other.rows(ids), weight.dequant()[ids])

    def test_rows_do_not_see_their_batch(self, size: tuple[int, int], dtype: torch.dtype, scheme: Scheme) -> None:
        weight = Weight.of(matrix(*size, dtype), scheme, cpu.Arena(ops.kernels_of(backends()[-1])))
        x = matrix(130, size[1], dtype, 3)
        whole = weight.matmul(x)
        for count in (1, 2, 3, 4, 6, 7, 13, 64):
            for first in (0, 1, 130 - count):
                part = slice(first, first + count)
                assert torch.equal(weight.matmul(x[part].clone()), whole[part])


@pytest.mark.skipif(not cpu.describe().built, reason=cpu.describe().why)
def test_int8_kernel_equals_its_reference_to_the_bit() -> None:
    codes, scales = round_blocks(matrix(77, 515, torch.float32), torch.int8, 1, 515)
    x = matrix(11, 515, torch.float32, 1)
    args = (x, pack_int8(codes), scales[:, 0].contiguous(), 77)
    for isa in ISAS:
        cpu.use_isa(isa)
        assert torch.equal(int8_linear.implementations["cpu"](*args), int8_linear.reference(*args))
    cpu.use_isa("")


@pytest.mark.parametrize("size", [(16, 8), (41, 100), (1, 33)], ids=str)
def test_integer_packing_is_a_bijection(size: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    eight = torch.randint(-127, 128, size, generator=g, dtype=torch.int8)
    assert torch.equal(unpack_int8(pack_int8(eight), *size), eight)
    four = torch.randint(0, 16, size, generator=g, dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(four, 32), *size), four)
    numbers = torch.rand(size, generator=g)
    assert torch.equal(by_output(by_tile(numbers), size[0]), numbers)


def test_rounding_errs_by_half_a_step() -> None:
    weight = matrix(64, 256, torch.float32)
    weight[3] = 0
    codes, scales, zeros = round_groups(weight, 32, symmetric=False)
    assert zeros is not None
    scale, zero = (t.float().repeat_interleave(32, 1) for t in (scales, zeros))
    error = ((codes.float() - zero) * scale - weight).abs()
    assert float((error / scale).max()) <= 1.01  # a rounded zero point may cost another half
    codes, scales = round_blocks(weight, torch.int8, 1, 256)
    assert float(((codes * scales - weight).abs() / scales.clamp(min=1e-9)).max()) <= 0.501


@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_int4_errs_by_half_a_step_or_clips_and_errs_less(group: int) -> None:
    """A scale that reaches the extreme errs by half a step; a smaller one is taken only where the squares are less."""
    weight = matrix(64, 256, torch.float32)
    weight[3] = 0
    codes, scales, zeros = round_groups(weight, group, symmetric=True)
    assert zeros is None
    scale, wide = scales.float().unsqueeze(-1), weight.unflatten(-1, (-1, group))
    error = (codes.unflatten(-1, (-1, group)).float() - 8) * scale - wide
    extreme = wide.gather(-1, wide.abs().argmax(-1, keepdim=True))
    reaching = (extreme / -8).half().float()
    reaching = torch.where(reaching == 0, 1, reaching)
    plain = (wide / reaching).round().clamp(-8, 7) * reaching - wide
    assert bool((error.square().sum(-1) <= plain.square().sum(-1) + 1e-6).all())
    clipped = scale.abs() < reaching.abs() * 0.99
    assert 0.1 < float(clipped.float().mean()) < 0.9
    # The side opposite to the extreme ends at 7 steps, so up to another half of a step lies beyond it.
    assert float((error / scale).abs().masked_fill(clipped, 0).max()) <= 1.01
    inside = (wide / scale).clamp(-8, 7) == wide / scale
    assert float((error / scale).abs().masked_fill(~inside, 0).max()) <= 0.501


def test_an_unknown_format_or_group_is_named() -> None:
    with pytest.raises(ConfigError, match="int8"):
        formats.get("int9")
    with pytest.raises(ConfigError, match="group=48"):
        Weight.of(matrix(16, 96, torch.float32), Scheme("int4", 48), cpu.Arena())


@pytest.mark.skipif(not cpu.describe().built, reason=cpu.describe().why)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_storing_kernels_equal_their_references_to_the_bit(isa: str, dtype: torch.dtype) -> None:
    cpu.use_isa(isa)
    try:
        for name in ("store_floats", "store_int8", "store_int4"):
            for seed, sample in enumerate(ops.table[name].samples()):
                expected, have = (sample.make(torch.Generator().manual_seed(seed))[0] for _ in range(2))
                scale = 10.0 ** (seed % 7 - 5)  # down to float16's small scales
                expected, have = (((a[0] * scale).to(dtype), *a[1:]) for a in (expected, have))
                if name == "store_floats":
                    expected, have = ((a[0], pack(torch.zeros_like(a[0]))) for a in (expected, have))
                ops.table[name].reference(*expected)
                ops.table[name].implementations["cpu"](*have)
                for e, h in zip(expected, have, strict=True):
                    assert e is None or e is h or isinstance(e, int) or torch.equal(e, h), (name, sample.name)
    finally:
        cpu.use_isa("")
