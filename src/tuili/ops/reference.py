"""What the row-wise ops mean, in torch. An output row depends on its own input row only, bit for bit (law 5)."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from tuili.ops import samples
from tuili.ops.table import Backend, op

#: Rows of a matmul are padded to a multiple of this. Kernels for 1 to 3 float32 rows add in another order than those
#: for many, so that a request's logits would depend on who shares its batch (measured; DESIGN.md law 5).
ROW_TILE = 8
#: Elements up to which torch's elementwise kernels stay in one thread (gelu; the others' limit is twice as high).
SERIAL = 0x4000


def pad_rows(x: torch.Tensor, tile: int = ROW_TILE) -> torch.Tensor:
    """``x`` with zero rows appended until ``len(x)`` is a multiple of ``tile``."""
    short = -x.shape[0] % tile
    return F.pad(x, (0, 0, 0, short)) if short else x


@op(samples.linear, tolerance=1e-5)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [rows, in] times ``weight`` [out, in] transposed, plus ``bias`` [out]: [rows, out] in x's dtype."""
    return F.linear(pad_rows(x), weight, bias)[: x.shape[0]]


@op(samples.embedding)
def embedding(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` [n] of ``weight`` [vocab, dim]."""
    return F.embedding(ids, weight)


@op(samples.rms_norm, tolerance=1e-5)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """``x`` [..., dim] over its root mean square, times ``weight + offset`` [dim]; in float32, result in x's dtype.

    ``offset`` 1 is Gemma's convention. Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.float() + offset)).to(x.dtype)


@op(samples.rotate, tolerance=1e-5)
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``x`` [n, heads, dim], half-rotation layout; ``cos``, ``sin`` [n, rotary/2] float32.

    Dimensions from ``rotary`` on pass unchanged. Su et al. 2021, arXiv:2104.09864.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


@op(samples.gated, tolerance=1e-5)
def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up`` of ``gate_up`` [n, 2 * dim] (gate first): [n, dim].

    Activations: silu, gelu_tanh, gelu.
    """
    gate, up = gate_up.chunk(2, -1)
    pieces = [activate(piece, activation) for piece in gate.split(_serial_rows(gate))]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)) * up


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    # Written out: torch's exact gelu is another kernel for one row than for many, with other last bits.
    wide = x.float()
    return (0.5 * wide * (1 + torch.erf(wide * 0.5**0.5))).to(x.dtype)


def _serial_rows(x: torch.Tensor) -> int:
    """How many rows of ``x`` [n, dim] torch works off in one thread (all, where there is one thread, or a GPU).

    Threads split a tensor anywhere, and silu and gelu use another exp for the last elements of a share than for the
    others: with two threads a row's bits would depend on the rows beside it (measured).
    """
    alone = x.device.type != "cpu" or torch.get_num_threads() == 1 or x.numel() <= SERIAL
    return max(1, len(x) if alone else SERIAL // x.shape[-1])


@op(samples.add)
def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x + y``, of one shape and dtype: the residual stream's step."""
    return x + y


def _add_then_norm(
    kernels: Backend, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    total = kernels.add(residual, x)
    return total, kernels.rms_norm(total, weight, eps, offset)


@op(samples.add_rms_norm, tolerance=1e-5, parts=_add_then_norm)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual + x`` (both [n, dim]), and ``rms_norm`` of that: one pass over memory."""
    total = residual + x
    return total, rms_norm.reference(total, weight, eps, offset)


@op(samples.scale)
def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    """``x`` times ``factor`` rounded to x's dtype (Gemma's embeddings)."""
    return x * _rounded(factor, x.dtype)


@cache
def _rounded(factor: float, dtype: torch.dtype) -> float:
    """``factor`` as ``dtype`` holds it. Looked up, so that a captured step makes no tensor for it."""
    return torch.tensor(factor, dtype=dtype, device="cpu").item()


@op(samples.softcap, tolerance=1e-5)
def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(x / cap)``: keeps ``x`` within ``cap`` (Gemma 2, arXiv:2408.00118)."""
    return torch.tanh(x / cap) * cap
