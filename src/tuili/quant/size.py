"""Bytes of a matrix in each format, as ``formats`` store it, padding included. No torch: planners price formats too.

``tests/plan`` holds it equal to what the formats allocate.
"""

from __future__ import annotations

from tuili.base.errors import ConfigError, nearest
from tuili.quant.scheme import TILE, Scheme

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def stored_bytes(out: int, into: int, scheme: Scheme, dtype: str) -> int:
    """Bytes of an [out, into] matrix stored by ``scheme`` in a model whose activations are ``dtype``.

    Whole tiles of 16 outputs. dense: bfloat16 by pairs of inputs. int8: codes by fours of inputs, a float32 scale per
    output. int4: half a byte per input of whole groups; per group a float16 scale and, unless symmetric, a zero byte.
    """
    outputs = -(-out // TILE) * TILE
    if scheme.format == "dense":
        pair = 2 if dtype == "bfloat16" else 1
        return outputs * (-(-into // pair) * pair) * BYTES[dtype]
    if scheme.format == "int8":
        return outputs * (-(-into // 4) * 4) + 4 * out
    if scheme.format == "int4":
        groups = -(-into // scheme.group)
        return outputs * groups * (scheme.group // 2 + 2 + (not scheme.symmetric))
    known = ("dense", "int8", "int4")
    raise ConfigError(f"the size of format {scheme.format!r} is not known.{nearest(scheme.format, known)}")
