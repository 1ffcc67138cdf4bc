"""The card's measured limits: copying memory, and matrix products in bfloat16, 8-bit floats and int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu.place import Entry, Place, seconds

FP8 = torch.float8_e4m3fn


def run(place: Place) -> None:
    """``copy`` in bytes per second (read and written), products in operations per second."""
    bytes_, side = (1 << 20, 64) if place.tiny else (4 << 30, 8192)
    place.attempt("copy", lambda: copy(bytes_, place.device))
    for name, make in PRODUCTS.items():
        place.attempt(name, lambda make=make: product(make(side, place.device), side, place.device))


def copy(size: int, device: str) -> Entry:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"value": 2 * size / seconds(lambda: target.copy_(source), device), "unit": "bytes/s"}


def product(call: Callable[[], Any], side: int, device: str) -> Entry:
    return {"value": 2 * side**3 / seconds(call, device), "unit": "operations/s"}


def _bfloat16(side: int, device: str) -> Callable[[], Any]:
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return lambda: a @ b


def _float8(side: int, device: str) -> Callable[[], Any]:
    a, b = (torch.randn(side, side, device=device).to(FP8) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _int8(side: int, device: str) -> Callable[[], Any]:
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


PRODUCTS = {"bfloat16": _bfloat16, "float8": _float8, "int8": _int8}
