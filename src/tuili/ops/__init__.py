"""Floor 1, data plane: kernels and their meaning. ``ops.linear(...)`` calls what is active in the op table."""

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
from tuili.ops.locate import locate
from tuili.ops.reference import add, add_rms_norm, embedding, gated, linear, rms_norm, rotate, scale, softcap
from tuili.ops.sampling import argmax, draw, logprobs
from tuili.ops.table import Op, Sample, active_backend, choose, implement, op, table, use

__all__ = [
    "Op",
    "Sample",
    "active_backend",
    "add",
    "add_rms_norm",
    "argmax",
    "causal_attention",
    "choose",
    "draw",
    "embedding",
    "gated",
    "implement",
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
    "use",
    "write_kv",
    "write_kv_fp8",
    "write_kv_int8",
]
