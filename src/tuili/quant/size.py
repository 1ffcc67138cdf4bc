"""Bytes of a matrix in each packing, as ``formats`` store it, padding included. No torch: planners price them too.

``tests/plan`` holds it equal to what the formats allocate.
"""

from __future__ import annotations

from tuili.quant.scheme import TILE, Scheme, packing_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def stored_bytes(out: int, into: int, scheme: Scheme, dtype: str, kernels: str = "cpu") -> int:
    """Bytes of an [out, into] matrix stored by ``scheme`` for ``kernels``, in a model whose activations are ``dtype``.

    dense: whole tiles of 16 outputs, bfloat16 by pairs of inputs; plain: as it is. int8: tiles, codes by fours of
    inputs, a float32 scale per output. int4: half a byte per input of whole groups, tiles of 16 outputs (int4_halves:
    64); per group a float16 (or wide) scale and, unless symmetric, a zero byte. bytes: a byte each; per group or
    block a float32 scale and, unless symmetric, a zero byte.
    """
    packing = packing_of(scheme, kernels)
    groups = _up(into, scheme.group) // scheme.group if scheme.group else 1
    zero = not scheme.symmetric
    if packing == "plain":
        return out * into * BYTES[dtype]
    if packing == "dense":
        return _up(out, TILE) * _up(into, 2 if dtype == "bfloat16" else 1) * BYTES[dtype]
    if packing == "int8":
        return _up(out, TILE) * _up(into, 4) + 4 * out
    if packing == "bytes":
        return out * into + _up(out, scheme.height) // scheme.height * groups * (4 + zero)
    scale = 4 if scheme.wide_scales else 2
    return _up(out, TILE if packing == "int4" else 64) * groups * (scheme.group // 2 + scale + zero)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
