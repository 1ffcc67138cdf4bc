"""Rounding to nearest: one function, the same codes wherever a matrix is stored; and its bits, which are kept."""

from __future__ import annotations

import hashlib

import pytest
import torch

from tuili import ops
from tuili.ops import cpu
from tuili.quant.place import DeviceMemory, place_on
from tuili.quant.round import round_to_nearest
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Weight

#: What each scheme makes of ``matrix()``: the first bytes of a hash of codes, scales and zero points.
GOLDEN = {
    Scheme("int8"): "bae933a4d197",
    Scheme("int8", 64): "9fcd38cbaf90",
    Scheme("int4", 32): "c539caf0bff3",
    Scheme("int4", 64): "a33ae771650a",
    Scheme("int4", 128, symmetric=False): "20d8bb16e5b6",
    Scheme("fp8"): "5423daa823b7",
    Scheme("fp8", 128): "4e1224dcf94b",
    Scheme("fp8", 128, height=128): "d5e7fe32b350",
}
ON = [ops.REFERENCE, *([ops.kernels_of("cpu")] if cpu.describe().built else [])]


def matrix(out: int = 200, into: int = 264) -> torch.Tensor:
    """Numbers of all sizes, made without a random generator of torch's; a row and a group of zeros."""
    at = torch.arange(out * into, dtype=torch.int64)
    numbers = ((at * 2654435761 + 12345) % 2**32).double() / 2**31 - 1
    found = (numbers * (1 + at // into % 7)).float().view(out, into)
    found[3], found[5, :64], found[7] = 0, 0, found[7] * 1e-6
    return found


def digest(*tensors: torch.Tensor | None) -> str:
    made = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            made.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:12]


@pytest.mark.parametrize("scheme", GOLDEN, ids=str)
def test_the_bits_of_what_is_rounded_are_kept(scheme: Scheme) -> None:
    codes = round_to_nearest(matrix(), scheme)
    assert digest(codes.values, codes.scales, codes.zeros) == GOLDEN[scheme]


@pytest.mark.parametrize("kernels", ON, ids=repr)
@pytest.mark.parametrize("scheme", GOLDEN, ids=str)
def test_what_is_stored_is_what_was_rounded(scheme: Scheme, kernels: ops.Kernels) -> None:
    """Also where a kernel rounds and packs in one pass: as filled with the codes, but for the scale of zeros."""
    for place in (place_on(kernels=kernels), DeviceMemory(torch.device("cpu"), kernels)):
        have = Weight.of(matrix(), scheme, place)
        want = Weight.empty(200, 264, scheme, torch.float32, place)
        want.fill(0, round_to_nearest(matrix(), scheme))
        for name, tensor in want.tensors.items():
            stored = have.tensors[name]
            same = stored.view(torch.uint8) == tensor.view(torch.uint8)
            assert bool(same.all()) or bool((stored[~(stored == tensor)] == 1).all()), name
        assert torch.equal(have.dequant(), want.dequant())


def test_a_number_that_is_hardly_there_is_rounded_all_the_same() -> None:
    tiny = torch.full((1, 32), 1e-40)
    for scheme in (Scheme("int8"), Scheme("fp8")):
        codes = round_to_nearest(tiny, scheme)
        assert float(codes.values.float().min()) == {"int8": 127, "fp8": 448}[scheme.format]
