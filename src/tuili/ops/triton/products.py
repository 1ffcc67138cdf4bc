"""Products with a weight, and the rounding of activations. A program holds a tile of outputs times rows.

The weight is the left operand: Hopper's tensor cores take that one from registers, where it was just unpacked, and
always 64 of its rows; of the other operand, the activations, as few as there are. Up to some hundred rows a product is
bound by the memory that the weight is read from, above by the tensor cores. With few rows the inputs are split among
programs, and ``_finish`` adds their sums in order.

``triton`` multiplies floats with cuBLAS; the tiles of the others depend on the number of rows (``tuning.py``).
``triton_invariant`` uses these kernels for floats too, with tiles and splits that only the matrix's shape decides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tuili.ops.rounding import LARGEST
from tuili.ops.table import implement
from tuili.ops.triton import layouts, tuning
from tuili.ops.triton.about import FAST, INVARIANT, describe, processors
from tuili.ops.triton.language import INTERPRETED, cast, dot, whole, widen
from tuili.ops.triton.rowwise import dense_last, pad, warps

#: How scales apply: not at all, one for all or per output (after the sums), per group or block (to each part).
NONE, AFTER, BLOCKS = 0, 1, 2


# The kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scaled(acc, scales, factors, o, r, outputs, rows, s_output, SCALING: tl.constexpr, FACTORS: tl.constexpr):
    """Sums [outputs, rows] as numbers."""
    acc = acc.to(tl.float32)
    if SCALING == 1:
        if FACTORS:
            acc *= tl.load(factors + r, mask=r < rows, other=0)[None, :]
        acc *= tl.load(scales + o * s_output, mask=o < outputs, other=0)[:, None]
    return acc


@triton.jit
def _deliver(acc, bias, out, o, r, outputs, rows, BIAS: tl.constexpr):
    """A tile of results, the bias added, to ``out`` [rows, outputs]."""
    if BIAS:
        acc += tl.load(bias + o, mask=o < outputs, other=0).to(tl.float32)[:, None]
    inside = (o < outputs)[:, None] & (r < rows)[None, :]
    tl.store(out + r[None, :].to(tl.int64) * outputs + o[:, None], cast(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def _tile(rows, OUTS: tl.constexpr, ROWS: tl.constexpr):
    """Outputs and rows of this program. Neighbours share the weight's tile, which so is read from memory once."""
    tile, across = tl.program_id(0), tl.cdiv(rows, ROWS)
    return tile // across * OUTS + tl.arange(0, OUTS), tile % across * ROWS + tl.arange(0, ROWS)


@triton.jit(do_not_specialize=["rows"])
def _product(
    x,
    factors,
    weight,
    scales,
    zeros,
    bias,
    out,
    parts,
    rows,
    outputs,
    inputs,
    x_row,
    w_row,
    f_row,
    s_output,
    s_block,
    SCALING: tl.constexpr,
    FACTORS: tl.constexpr,
    BIAS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """``weight`` floats or bytes; where scales (and zeros) apply to parts, HEIGHT outputs x WIDTH inputs share one, and
    INPUTS divides WIDTH. ``FACTORS``: ``x`` are codes, times a factor per row (or row and WIDTH inputs)."""
    o, r = _tile(rows, OUTS, ROWS)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(inputs, INPUTS), SPLITS) * INPUTS
    weights = weight + o[:, None].to(tl.int64) * w_row
    places = x + r[None, :].to(tl.int64) * x_row
    kind: tl.constexpr = tl.int32 if weight.dtype.element_ty == tl.int8 and FACTORS else tl.float32
    acc = tl.zeros((OUTS, ROWS), tl.float32 if SCALING == 2 else kind)
    for first in range(split * share, tl.minimum(inputs, (split + 1) * share), INPUTS):
        at = first + tl.arange(0, INPUTS)
        filled, present = (o < outputs)[:, None], (r < rows)[None, :]
        if not EVEN:
            filled, present = filled & (at < inputs)[None, :], present & (at < inputs)[:, None]
        w = tl.load(weights + at[None, :], mask=filled, other=0.0)
        if ZEROS:
            zero = tl.load(zeros + o // HEIGHT * s_output + first // WIDTH * s_block, mask=o < outputs, other=0)
            w = w.to(tl.int16) - zero.to(tl.int16)[:, None]
        w = widen(w, x.dtype.element_ty)
        t = tl.load(places + at[:, None], mask=present, other=0.0)
        if SCALING == 2:
            sums = dot(w, t, tl.zeros((OUTS, ROWS), kind)).to(tl.float32)
            block = first // WIDTH
            if FACTORS:
                sums *= tl.load(factors + r * f_row + block, mask=r < rows, other=0)[None, :]
            sums *= tl.load(scales + o // HEIGHT * s_output + block * s_block, mask=o < outputs, other=0)[:, None]
            acc += sums
        elif FACTORS and kind == tl.float32:
            # The tensor cores add products of 8-bit floats with some 14 bits: not over all inputs.
            acc += dot(w, t, tl.zeros((OUTS, ROWS), tl.float32))
        else:
            acc = dot(w, t, acc)
    if SPLITS > 1:
        _deliver(acc, bias, parts + split.to(tl.int64) * rows * outputs, o, r, outputs, rows, False)
    else:
        acc = _scaled(acc, scales, factors, o, r, outputs, rows, s_output, SCALING, FACTORS)
        _deliver(acc, bias, out, o, r, outputs, rows, BIAS)


@triton.jit
def _less(code, offset, dtype: tl.constexpr):
    """4-bit codes minus ``offset``, as ``dtype``: exact. Halves are put together from bits: 128 + c, or 1024 + c."""
    if dtype == tl.float32:
        less = code.to(tl.float32) - offset.to(tl.float32)
    else:
        BITS: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        left = (code.to(tl.uint16) | BITS).to(dtype, bitcast=True)
        right = (offset.to(tl.uint16) | BITS).to(dtype, bitcast=True)
        if INTERPRETED:
            less = (left.to(tl.float32) - right.to(tl.float32)).to(dtype)
        else:
            less = left - right
    return less


@triton.jit(do_not_specialize=["rows"])
def _int4_product(
    x,
    tiles,
    scales,
    zeros,
    bias,
    out,
    parts,
    rows,
    outputs,
    inputs,
    groups,
    x_row,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A step is a group: what is summed are whole codes, the scale goes on the group's sum."""
    HALF: tl.constexpr = GROUP // 2
    TILE: tl.constexpr = 64
    dtype: tl.constexpr = x.dtype.element_ty
    o, r = _tile(rows, OUTS, ROWS)
    split = tl.program_id(1)
    share = tl.cdiv(groups, SPLITS)
    line = (o // TILE * groups * TILE + o % TILE).to(tl.int64)
    stored = o < (outputs + TILE - 1) // TILE * TILE
    half = tl.arange(0, HALF)
    places = x + r[None, :].to(tl.int64) * x_row + split * share * GROUP + half[:, None]
    present = (r < rows)[None, :] & (half >= 0)[:, None]
    acc = tl.zeros((OUTS, ROWS), tl.float32)
    for g in range(split * share, tl.minimum(groups, (split + 1) * share)):
        lines = line + g * TILE
        pairs = tl.load(tiles + lines[:, None] * HALF + half[None, :], mask=stored[:, None], other=0)
        scale = tl.load(scales + lines, mask=stored, other=0).to(tl.float32)
        if ZEROS:
            offset = tl.load(zeros + lines, mask=stored, other=0)[:, None]
        else:
            offset = tl.full((OUTS, 1), 8, tl.uint8)
        if EVEN:
            low, high = tl.load(places, mask=present, other=0.0), tl.load(places + HALF, mask=present, other=0.0)
        else:
            left = inputs - g * GROUP
            low = tl.load(places, mask=present & (half < left)[:, None], other=0.0)
            high = tl.load(places + HALF, mask=present & (half + HALF < left)[:, None], other=0.0)
        sums = dot(_less(pairs & 15, offset, dtype), low, tl.zeros((OUTS, ROWS), tl.float32))
        sums = dot(_less(pairs >> 4, offset, dtype), high, sums)
        acc += sums * scale[:, None]
        places += GROUP
    if SPLITS > 1:
        _deliver(acc, bias, parts + split.to(tl.int64) * rows * outputs, o, r, outputs, rows, False)
    else:
        _deliver(acc, bias, out, o, r, outputs, rows, BIAS)


@triton.jit(do_not_specialize=["rows"])
def _finish(
    parts,
    scales,
    factors,
    bias,
    out,
    rows,
    outputs,
    s_output,
    SCALING: tl.constexpr,
    FACTORS: tl.constexpr,
    BIAS: tl.constexpr,
    OUTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The sums of all splits, in order."""
    o, r = _tile(rows, OUTS, 1)
    place = parts + r[None, :].to(tl.int64) * outputs + o[:, None]
    acc = tl.zeros((OUTS, 1), parts.dtype.element_ty)
    for split in tl.static_range(SPLITS):
        acc += tl.load(place + tl.cast(rows, tl.int64) * outputs * split, mask=(o < outputs)[:, None], other=0)
    acc = _scaled(acc, scales, factors, o, r, outputs, rows, s_output, SCALING, FACTORS)
    _deliver(acc, bias, out, o, r, outputs, rows, BIAS)


@triton.jit
def _round(x, codes, factors, inputs, x_row, f_row, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """``layouts.round_rows`` of one row and block."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(x + row * x_row + at, mask=at < inputs, other=0).to(tl.float32)
    factor = tl.div_rn(tl.max(tl.abs(wide), 0), MOST)
    exact = tl.div_rn(wide, tl.maximum(factor, 1.1754943508222875e-38))
    if codes.dtype.element_ty == tl.int8:
        exact = whole(exact)
    tl.store(codes + row * inputs + at, cast(exact, codes.dtype.element_ty), mask=at < inputs)
    tl.store(factors + row * f_row + block, factor)


# Calling them ---------------------------------------------------------------------------------------------------------


def round_rows(x: torch.Tensor, dtype: torch.dtype, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``layouts.round_rows``; ``block`` is the row's length or a power of two."""
    x = dense_last(x)
    rows, inputs = x.shape
    blocks = triton.cdiv(inputs, block)
    codes = torch.empty(rows, inputs, dtype=dtype, device=x.device)
    factors = torch.empty(rows, blocks, dtype=torch.float32, device=x.device)
    sizes = {"MOST": LARGEST[dtype], "BLOCK": pad(block)}
    if rows:
        _round[(rows, blocks)](x, codes, factors, inputs, x.stride(0), blocks, **sizes, num_warps=warps(pad(block)))
    return codes, factors


def kernel_of(op: str, dtype: torch.dtype) -> str:
    """What a card's file calls the kernel of ``op`` for codes of ``dtype``: each kind has its own tensor cores."""
    return op if dtype == torch.uint8 else f"{op} {str(dtype).removeprefix('torch.')}"


def tile_of(kernel: str, rows: int, outputs: int, inputs: int, device: torch.device, invariant: bool) -> tuning.Tile:
    """Measured for this card, guessed, or the same for any number of rows."""
    if invariant:
        return tuning.invariant(outputs, inputs)
    measured = tuning.card(describe().card).find(kernel, rows, outputs, inputs)
    return measured or tuning.guess(rows, outputs, inputs, processors(device))


def product(
    x: torch.Tensor,
    factors: torch.Tensor | None,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: tuning.Tile,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x`` (floats, or codes with ``factors``) times ``weight`` (floats, or codes with ``scales``), as ``dtype``."""
    x, weight = dense_last(x), dense_last(weight)
    (rows, inputs), outputs = x.shape, len(weight)
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    height, width = (outputs, inputs) if scales is None else layouts.block_of(scales, outputs, inputs)
    parted = zeros is not None or width < inputs or height not in (1, outputs)
    scaling = NONE if scales is None else BLOCKS if parted else AFTER
    step = min(tile.inputs, width) if width < inputs else tile.inputs
    exact = factors is not None and weight.dtype == torch.int8 and scaling != BLOCKS
    sizes = {"SCALING": scaling, "FACTORS": factors is not None, "BIAS": bias is not None}
    scales = out if scales is None else scales
    s_output, s_block = (0, 0) if scaling == NONE else (scales.stride(0) if len(scales) > 1 else 0, scales.stride(1))

    def launch(parts: torch.Tensor, grid: tuple[int, int]) -> None:
        _product[grid](
            *(x, factors if factors is not None else out, weight, scales, zeros if zeros is not None else out),
            *(bias if bias is not None else out, out),
            *(parts, rows, outputs, inputs, x.stride(0), weight.stride(0), 0 if factors is None else factors.stride(0)),
            *(s_output, s_block),
            **sizes,
            HEIGHT=height if parted else 1,
            WIDTH=width if parted else 1,
            ZEROS=zeros is not None,
            EVEN=inputs % step == 0,
            OUTS=tile.outputs,
            ROWS=tile.rows,
            INPUTS=step,
            SPLITS=tile.splits,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    return _run(launch, out, tile, torch.int32 if exact else torch.float32, scales, factors, s_output, bias, sizes)


def _run(
    launch: Any,
    out: torch.Tensor,
    tile: tuning.Tile,
    sums: torch.dtype,
    scales: torch.Tensor,
    factors: torch.Tensor | None,
    s_output: int,
    bias: torch.Tensor | None,
    sizes: dict[str, Any],
) -> torch.Tensor:
    """Launch over all tiles, and add the splits where there are some."""
    rows, outputs = out.shape
    if not rows:
        return out
    parts = out.new_empty((tile.splits, rows, outputs) if tile.splits > 1 else 0, dtype=sums)
    launch(parts, (triton.cdiv(outputs, tile.outputs) * triton.cdiv(rows, tile.rows), tile.splits))
    if tile.splits > 1:
        block = min(1024, pad(outputs, 16))
        others = factors if factors is not None else out, bias if bias is not None else out
        _finish[(triton.cdiv(outputs, block) * rows,)](
            *(parts, scales, *others, out, rows, outputs, s_output), **sizes, OUTS=block, SPLITS=tile.splits
        )
    return out


# The ops --------------------------------------------------------------------------------------------------------------


@implement("linear", FAST)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """cuBLAS (on the CPU: torch's own), which chooses its kernel, and so the last bits, by the number of rows."""
    return F.linear(x, weight, bias)


@implement("linear", INVARIANT)
def invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    tile = tile_of("linear", len(x), *weight.shape, x.device, True)  # type: ignore[call-arg]
    return product(x, None, weight, None, bias, x.dtype, tile)


def _byte_weight_only(invariant: bool) -> Any:
    def byte_weight_only_linear(
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
    ) -> torch.Tensor:
        kernel = kernel_of("byte_weight_only_linear", codes.dtype)
        tile = tile_of(kernel, len(x), *codes.shape, x.device, invariant)  # type: ignore[call-arg]
        return product(x, None, codes, scales, bias, x.dtype, tile, zeros)

    return byte_weight_only_linear


def _byte(invariant: bool) -> Any:
    def byte_linear(
        x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rounded, factors = round_rows(x, codes.dtype, layouts.block_of(scales, *codes.shape)[1])  # type: ignore[call-arg]
        kernel = kernel_of("byte_linear", codes.dtype)
        tile = tile_of(kernel, len(x), *codes.shape, x.device, invariant)  # type: ignore[call-arg]
        return product(rounded, factors, codes, scales, bias, x.dtype, tile)

    return byte_linear


def _int4_weight_only(invariant: bool) -> Any:
    def int4_weight_only_linear(
        x: torch.Tensor,
        tiles: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        outputs: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = dense_last(x)
        (rows, inputs), groups, group = x.shape, tiles.shape[1], tiles.shape[3] * 2
        tile = tile_of("int4_weight_only_linear", rows, outputs, inputs, x.device, invariant)
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)

        def launch(parts: torch.Tensor, grid: tuple[int, int]) -> None:
            _int4_product[grid](
                *(x, tiles, scales, zeros if zeros is not None else tiles, bias if bias is not None else out, out),
                *(parts, rows, outputs, inputs, groups, x.stride(0)),
                GROUP=group,
                ZEROS=zeros is not None,
                BIAS=bias is not None,
                EVEN=inputs % group == 0,
                OUTS=tile.outputs,
                ROWS=tile.rows,
                SPLITS=tile.splits,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )

        sizes = {"SCALING": NONE, "FACTORS": False, "BIAS": bias is not None}
        return _run(launch, out, tile, torch.float32, scales, None, 0, bias, sizes)

    return int4_weight_only_linear


for _backend, _fixed in ((FAST, False), (INVARIANT, True)):
    implement("byte_weight_only_linear", _backend)(_byte_weight_only(_fixed))
    implement("byte_linear", _backend)(_byte(_fixed))
    implement("int4_weight_only_linear", _backend)(_int4_weight_only(_fixed))
