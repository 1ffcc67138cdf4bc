"""Every packing, for the C++ kernels and for Triton's (interpreted): it means what was stored, to the bit and the byte.

Parametrized over schemes; ``test_every_packing_is_tested`` holds that no registered one is left out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuili import ops
from tuili.base.errors import ConfigError
from tuili.ops import REFERENCE, Kernels, cpu, triton
from tuili.ops.triton import layouts
from tuili.quant.formats import format_of, formats
from tuili.quant.formats.bytes import Bytes
from tuili.quant.formats.int4_halves import Int4Halves
from tuili.quant.place import DeviceMemory, place_on
from tuili.quant.scheme import SCHEMES, Scheme
from tuili.quant.weight import Codes, Weight

ALL = [
    *SCHEMES.values(),
    *(Scheme("int4", group, symmetric, True) for group in (64, 128) for symmetric in (True, False)),
    Scheme("int4", 32, False),
    Scheme("int4", 64, True, True, wide_scales=True),
    Scheme("int4", 32, False, False, wide_scales=True),
    *(Scheme("int8", group, weight_only=only) for group, only in ((32, True), (64, False), (128, True))),
    *(Scheme("int8", group, False, True) for group in (0, 32, 128)),
    *(Scheme("fp8", 128, weight_only=only, height=height) for height in (1, 128) for only in (True, False)),
]
USABLE = pytest.mark.skipif(not triton.describe().usable, reason=triton.describe().why)
ON_CPU = ["reference", *(["cpu"] if cpu.describe().built else [])]
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(41, 100), (96, 256), (200, 192)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packing(backend: str) -> str:
    return "triton" if backend.startswith("triton") else "cpu"


def codes_of(scheme: Scheme, out: int, into: int) -> tuple[Codes, torch.Tensor]:
    """Random codes, and the matrix that they mean."""
    g = torch.Generator().manual_seed(1)
    height, width = scheme.height, scheme.group or into
    shape = (-(-out // height), -(-into // width))
    scales = (torch.rand(shape, generator=g) + 0.5) / 99
    if scheme.format == "fp8":
        values = random(out, into).mul(90).clamp(-448, 448).to(layouts.FP8)
        zeros = None
    else:
        low, high, dtype = (0, 16, torch.uint8) if scheme.format == "int4" else (-128, 128, torch.int8)
        values = torch.randint(low, high, (out, into), generator=g).to(dtype)
        zeros = None if scheme.symmetric else torch.randint(low, high, shape, generator=g).to(dtype)
    if scheme.format == "int4" and not scheme.wide_scales:
        scales = scales.half().float()

    def spread(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.float().repeat_interleave(height, 0)[:out].repeat_interleave(width, 1)[:, :into]

    middle = 8.0 if scheme.format == "int4" else 0.0
    return Codes(values, scales, zeros), (values.float() - (middle if zeros is None else spread(zeros))) * spread(
        scales
    )


def stored(
    scheme: Scheme, out: int, into: int, dtype: torch.dtype, kernels: Kernels = REFERENCE
) -> tuple[Weight, torch.Tensor]:
    """A weight filled in slices from codes (floats, where the scheme has none), and the float32 that it means."""
    weight = Weight.empty(out, into, scheme, dtype, place_on("cpu", kernels))
    if scheme.format == "dense":
        meaning = random(out, into).to(dtype).float()
        whole: Any = meaning.to(dtype)
    else:
        whole, meaning = codes_of(scheme, out, into)
    step = weight.step
    for start in range(0, out, step):
        part = slice(start, start + step)
        if isinstance(whole, Codes):
            lines = slice(start // scheme.height, -(-min(start + step, out) // scheme.height))
            zeros = None if whole.zeros is None else whole.zeros[lines]
            weight.fill(start, Codes(whole.values[part], whole.scales[lines], zeros))
        else:
            weight.fill(start, whole[part])
    return weight, meaning


def rounded(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """``x`` as the product sees it."""
    scheme = weight.scheme
    if scheme.format == "dense" or scheme.weight_only or isinstance(weight.format, Int4Halves):
        return x.float()
    dtype = layouts.FP8 if scheme.format == "fp8" else torch.int8
    block = scheme.group if scheme.group and isinstance(weight.format, Bytes) else x.shape[1]
    codes, factors = layouts.round_rows(x, dtype, block)
    return codes.float() * factors.repeat_interleave(block, 1)[:, : x.shape[1]]


def test_every_packing_is_tested() -> None:
    assert formats.broken() == {}
    kinds = {type(format_of(scheme, who)) for scheme in ALL for who in ("cpu", "triton")}
    assert kinds == {formats.get(name) for name in formats.names()}


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_one_format_takes_a_scheme(scheme: Scheme) -> None:
    for who in ("cpu", "triton"):
        assert [formats.get(name)().takes(scheme, who) for name in formats.names()].count(True) == 1


@pytest.mark.parametrize("backend", [*ON_CPU, pytest.param("triton", marks=USABLE)])
@pytest.mark.parametrize("scheme", ALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_means_what_was_stored(scheme: Scheme, dtype: torch.dtype, backend: str) -> None:
    """The matrix, its rows, its product and its bytes."""
    kernels = ops.kernels_of(backend)
    for out, into in SIZES if packing(backend) == "cpu" or dtype == torch.float32 else SIZES[:1]:
        weight, meaning = stored(scheme, out, into, dtype, kernels)
        assert torch.equal(weight.dequant(), meaning.to(dtype))
        ids = torch.tensor([0, out - 1, 7, 7])
        assert torch.equal(weight.rows(ids), meaning.to(dtype)[ids])
        assert weight.nbytes == weight.format.bytes(out, into, scheme, str(dtype)[6:])
        x, bias = random(5, into, seed=2).to(dtype), random(out, seed=3).to(dtype)
        want = rounded(x, weight) @ meaning.T + bias.float()
        have = weight.matmul(x, bias)
        assert have.dtype == dtype
        loose = 1e-5 if dtype == torch.float32 else 2**-7
        assert float((have.float() - want).abs().max()) <= loose * float(want.abs().max())


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_rows_do_not_see_their_batch(scheme: Scheme, backend: str) -> None:
    kernels = ops.kernels_of(backend)
    weight, _ = stored(scheme, 96, 256, torch.bfloat16, kernels)
    x = random(40, 256, seed=4).bfloat16()
    whole = weight.matmul(x)
    for first, end in ((0, 1), (37, 40), (5, 12)):
        assert torch.equal(weight.matmul(x[first:end].clone()), whole[first:end])


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("scheme", [scheme for scheme in ALL if scheme.symmetric and scheme.format != "dense"], ids=str)
def test_both_places_round_alike(scheme: Scheme, backend: str) -> None:
    """``--quantization`` gives one matrix, wherever it is stored."""
    matrix = random(200, 192)
    matrix[3] = 0
    kernels = ops.kernels_of(backend)
    places = place_on("cpu", kernels), DeviceMemory(torch.device("cpu"))
    here, there = (Weight.of(matrix, scheme, place).dequant() for place in places)
    assert torch.equal(here, there)
    if scheme.format != "int4":  # whose scale cuts off what is rare: test_formats.py says how far it may err
        error = {"int8": 1 / 254, "fp8": 1 / 28}[scheme.format]
        assert float((here - matrix).abs().max()) <= 1.01 * error * float(matrix.abs().max())


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_nothing_stays_behind_on_the_cpu(scheme: Scheme) -> None:
    """On another device (here one without memory, which refuses to meet CPU tensors) all is made there."""
    meta = torch.device("meta")
    place = DeviceMemory(meta)
    with torch.device("cpu"):
        weight = Weight.empty(200, 192, scheme, torch.bfloat16, place)
        if scheme.symmetric:
            weight.fill(0, torch.ones(200, 192, dtype=torch.bfloat16, device=meta))
        if scheme.format != "dense":
            weight.fill(0, codes_of(scheme, 200, 192)[0].each(place.bring))
        x, ids = torch.ones(3, 192, dtype=torch.bfloat16, device=meta), torch.ones(3, dtype=torch.long, device=meta)
        made = [weight.dequant(), weight.rows(ids), weight.matmul(x), *weight.tensors.values()]
    assert {tensor.device for tensor in made} == {meta}
    assert [tuple(tensor.shape) for tensor in made[:3]] == [(200, 192), (3, 192), (3, 200)]


def test_the_place_follows_the_device_and_the_kernels() -> None:
    assert place_on().packing == "cpu"
    if triton.describe().usable:
        assert place_on("cpu", ops.kernels_of("triton")).packing == "triton"
    assert place_on("meta").packing == "triton"
    device = DeviceMemory(torch.device("meta"))
    assert device.bring(torch.ones(3)).device.type == device.empty((2, 2), torch.uint8).device.type == "meta"


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (Scheme("int5"), "'int5'.*Did you mean 'int"),
        (Scheme("int4", 48), "group=48"),
        (Scheme("int8", 16), "group=16"),
        (Scheme("fp8", 64, height=128), "blocks of 128 x 64"),
        (Scheme("fp8", symmetric=False, weight_only=True), "zero points go with int8"),
        (Scheme("int8", symmetric=False), "zero points go with int8"),
    ],
    ids=str,
)
def test_what_nothing_stores_is_named(scheme: Scheme, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Weight.empty(16, 128, scheme, torch.float32, DeviceMemory(torch.device("cpu")))


# Orders are bijections (INVENTORY 80) ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.integers(1, 150),
    st.integers(1, 300),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(["cpu", "triton"]),
)
def test_repacking_4_bits_is_a_bijection(data: st.DataObject, out: int, into: int, group: int, who: str) -> None:
    """Every code has a place of its own, the inverse finds it, and nothing but padding is left."""
    from tuili.ops.cpu import integer

    module: Any = integer if who == "cpu" else layouts
    seed = data.draw(st.integers(0, 2**31))
    codes = torch.randint(1, 16, (out, into), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    tiles = module.pack_int4(codes, group)
    assert torch.equal(module.unpack_int4(tiles, out, into), codes)
    assert int((tiles & 15 != 0).sum() + (tiles >> 4 != 0).sum()) == codes.numel()
    row, column = data.draw(st.integers(0, out - 1)), data.draw(st.integers(0, into - 1))
    codes[row, column] = 16 - codes[row, column]
    if codes[row, column] != 8:
        assert int((module.pack_int4(codes, group) != tiles).sum()) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 130), st.integers(0, 2**31))
def test_repacking_8_bits_is_a_bijection(out: int, into: int, seed: int) -> None:
    from tuili.ops.cpu.integer import pack_int8, unpack_int8

    codes = torch.randint(-128, 128, (out, into), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(unpack_int8(pack_int8(codes), out, into), codes)
