"""Floor 1, data plane: kernels and their meaning. ``ops.linear(...)`` is the meaning, ``Kernels`` are the speed."""

from tuili.ops.attention import (
    causal_attention,
    paged_attention,
    paged_attention_fp8,
    paged_attention_int8,
    rotate_write_kv,
    write_kv,
    write_kv_fp8,
    write_kv_int8,
)
from tuili.ops.kernels import REFERENCE, Kernels, kernels_of
from tuili.ops.locate import locate
from tuili.ops.reference import add, add_rms_norm, embedding, gated, linear, rms_norm, rotate, scale, softcap
from tuili.ops.sampling import argmax, draw, logprobs
from tuili.ops.table import Op, Sample, implement, op, table

__all__ = [
    "REFERENCE",
    "Kernels",
    "Op",
    "Sample",
    "add",
    "add_rms_norm",
    "argmax",
    "causal_attention",
    "draw",
    "embedding",
    "gated",
    "implement",
    "kernels_of",
    "linear",
    "locate",
    "logprobs",
    "op",
    "paged_attention",
    "paged_attention_fp8",
    "paged_attention_int8",
    "rms_norm",
    "rotate",
    "rotate_write_kv",
    "scale",
    "softcap",
    "table",
    "write_kv",
    "write_kv_fp8",
    "write_kv_int8",
]
