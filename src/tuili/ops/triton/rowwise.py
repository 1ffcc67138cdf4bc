"""Ops on rows: a program holds whole rows in registers, reads each number once and writes each once.

All are bound by memory bandwidth. How many rows a program takes depends on the row's size only, never on how many rows
there are, so every one of them is batch-invariant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tuili.ops.table import implement, table
from tuili.ops.triton.about import FAST, INVARIANT
from tuili.ops.triton.language import LOG2_E, cast, tanh

#: Elements that a program of four warps holds in registers without trouble.
PROGRAM = 4096
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def both(name: str):  # type: ignore[no-untyped-def]
    """Register a kernel that is invariant as it is, for both backends."""
    return lambda function: implement(name, INVARIANT)(implement(name, FAST)(function))


def dense_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` with neighbours side by side in its last dimension; the other strides may be anything."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def pad(size: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, triton.next_power_of_2(size))


def warps(elements: int) -> int:
    """For a program that holds so many elements: about 16 of them per thread, 1 to 8 warps."""
    return min(8, pad(-(-elements // 512)))


# Normalization --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x,
    residual,
    total,
    weight,
    out,
    rows,
    row_stride,
    head_stride,
    residual_stride,
    eps,
    offset,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, PADDED)[None, :]
    inside = (row < rows) & (at < DIM)
    wide = tl.load(x + row // HEADS * row_stride + row % HEADS * head_stride + at, mask=inside, other=0).to(tl.float32)
    if RESIDUAL:
        wide += tl.load(residual + row * residual_stride + at, mask=inside, other=0).to(tl.float32)
        narrow = cast(wide, total.dtype.element_ty)
        tl.store(total + row * DIM + at, narrow, mask=inside)
        wide = narrow.to(tl.float32)
    factor = 1 / tl.sqrt_rn(tl.sum(wide * wide, 1) / DIM + eps)
    scale = tl.load(weight + at, mask=at < DIM, other=0).to(tl.float32) + offset
    tl.store(out + row * DIM + at, cast(wide * factor[:, None] * scale, out.dtype.element_ty), mask=inside)


@both("rms_norm")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    x = dense_last(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.dim() not in (2, 3):
        return table["rms_norm"].reference(x, weight, eps, offset)
    heads = x.shape[1] if x.dim() == 3 else 1
    _normalize(x, None, None, weight, out, heads, x.stride(1) if heads > 1 else 0, eps, offset)
    return out


@both("add_rms_norm")
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = dense_last(x), dense_last(residual)
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _normalize(x, residual, total, weight, out, 1, 0, eps, offset)
    return total, out


def _normalize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    total: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    head_stride: int,
    eps: float,
    offset: float,
) -> None:
    rows, dim = len(x) * heads, x.shape[-1]
    if not rows:
        return
    padded = pad(dim)
    each = max(1, PROGRAM // 2 // padded)
    _rms_norm[(triton.cdiv(rows, each),)](
        *(x, x if residual is None else residual, out if total is None else total, weight, out, rows),
        *(x.stride(0), head_stride),
        *(0 if residual is None else residual.stride(0), eps, offset),
        DIM=dim,
        PADDED=padded,
        HEADS=heads,
        ROWS=each,
        RESIDUAL=residual is not None,
        num_warps=warps(each * padded),
    )


# Rotary embedding -----------------------------------------------------------------------------------------------------


@triton.jit
def turned(x, cos, sin, head_stride, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, HALF: tl.constexpr,
           PADDED_HALF: tl.constexpr):  # fmt: skip
    """The rotated halves of all heads of one token, float32 [heads, half] each, and where they are inside."""
    head, at = tl.arange(0, PADDED_HEADS)[:, None], tl.arange(0, PADDED_HALF)[None, :]
    inside = (head < HEADS) & (at < HALF)
    first = tl.load(x + head * head_stride + at, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + head * head_stride + HALF + at, mask=inside, other=0).to(tl.float32)
    c, s = tl.load(cos + at, mask=at < HALF, other=0), tl.load(sin + at, mask=at < HALF, other=0)
    return first * c - second * s, second * c + first * s, inside


@triton.jit
def rotate_row(x, cos, sin, out, head_stride, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, HALF: tl.constexpr,
               PADDED_HALF: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """One token's heads, rotated, to ``out`` [heads, dim]; dimensions past the rotated ones pass."""
    one, two, inside = turned(x, cos, sin, head_stride, HEADS, PADDED_HEADS, HALF, PADDED_HALF)
    head, at = tl.arange(0, PADDED_HEADS)[:, None], tl.arange(0, PADDED_HALF)[None, :]
    tl.store(out + head * DIM + at, cast(one, out.dtype.element_ty), mask=inside)
    tl.store(out + head * DIM + HALF + at, cast(two, out.dtype.element_ty), mask=inside)
    if REST > 0:
        past = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (head < HEADS) & (past < DIM)
        tl.store(out + head * DIM + past, tl.load(x + head * head_stride + past, mask=inside), mask=inside)


@triton.jit
def _rotate(x, cos, sin, out, row_stride, head_stride, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr,
            HALF: tl.constexpr, PADDED_HALF: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rotate_row(x + row * row_stride, cos + row * HALF, sin + row * HALF, out + row * HEADS * DIM, head_stride,
               HEADS, PADDED_HEADS, HALF, PADDED_HALF, DIM, REST)  # fmt: skip


def rotation(heads: int, half: int, dim: int) -> dict[str, int]:
    """The constants of ``rotate_row``."""
    rest = dim - 2 * half
    return {
        "HEADS": heads,
        "PADDED_HEADS": pad(heads),
        "HALF": half,
        "PADDED_HALF": pad(half),
        "DIM": dim,
        "REST": pad(rest) if rest else 0,
    }


@both("rotate")
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x, cos, sin = dense_last(x), cos.contiguous(), sin.contiguous()
    n, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if n:
        sizes = rotation(heads, cos.shape[-1], dim)
        each = sizes["PADDED_HEADS"] * sizes["PADDED_HALF"]
        _rotate[(n,)](x, cos, sin, out, x.stride(0), x.stride(1), **sizes, num_warps=warps(2 * each))
    return out


# Gated activation, soft cap -------------------------------------------------------------------------------------------


@triton.jit
def _activate(x, KIND: tl.constexpr):
    if KIND == 0:
        return x / (1 + tl.exp2(-LOG2_E * x))
    if KIND == 1:
        return x / (1 + tl.exp2(-2 * LOG2_E * 0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gated(x, out, dim, row_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < dim
    gate = tl.load(x + row * row_stride + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(x + row * row_stride + dim + at, mask=inside, other=0).to(tl.float32)
    act = cast(_activate(gate, KIND), out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * dim + at, cast(act * up, out.dtype.element_ty), mask=inside)


@both("gated")
def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    x = dense_last(gate_up)
    if activation not in ACTIVATIONS or x.dim() != 2:
        return table["gated"].reference(gate_up, activation)
    rows, dim = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    if rows:
        block = min(1024, pad(dim, 16))
        grid = rows, triton.cdiv(dim, block)
        _gated[grid](x, out, dim, x.stride(0), KIND=ACTIVATIONS[activation], BLOCK=block, num_warps=warps(2 * block))
    return out


@triton.jit
def _softcap(x, out, size, cap, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(x + at, mask=at < size, other=0).to(tl.float32)
    tl.store(out + at, cast(tanh(wide / cap) * cap, out.dtype.element_ty), mask=at < size)


@both("softcap")
def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _softcap[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), cap, BLOCK=1024, num_warps=4)
    return out


# Embedding ------------------------------------------------------------------------------------------------------------


@triton.jit
def _embedding(weight, ids, out, dim, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + row).to(tl.int64)
    tl.store(out + row * dim + at, tl.load(weight + id * dim + at, mask=at < dim), mask=at < dim)


@both("embedding")
def embedding(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    weight, ids = weight.contiguous(), ids.contiguous()
    n, dim = len(ids), weight.shape[1]
    out = torch.empty(n, dim, dtype=weight.dtype, device=weight.device)
    if n:
        block = min(1024, pad(dim, 16))
        _embedding[(n, triton.cdiv(dim, block))](weight, ids, out, dim, BLOCK=block, num_warps=warps(2 * block))
    return out
