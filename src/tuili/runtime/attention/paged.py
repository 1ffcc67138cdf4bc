"""Attention through the op table: rotate, store this step's K and V in the pool, attend over each request's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tuili.ops import REFERENCE, Kernels

if TYPE_CHECKING:
    from tuili.layers.attention import Kind
    from tuili.layers.rope import Angles
    from tuili.runtime.batch import ForwardBatch
    from tuili.runtime.kvstore import KVStore


#: What writes and reads a pool of codes.
OVER_CODES = {
    torch.int8: ("write_kv_int8", "paged_attention_int8"),
    torch.float8_e4m3fn: ("write_kv_fp8", "paged_attention_fp8"),
}


class PagedAttention:
    """The AttentionBackend that runs everywhere. Writing before reading lets requests of one step share blocks, and a
    step's own K and V are read as later steps will read them (rounded, in a pool of codes)."""

    def __init__(self, kernels: Kernels = REFERENCE):
        self.kernels = kernels

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: Angles,
        layer: int,
        batch: ForwardBatch,
        kv: KVStore,
        kind: Kind,
    ) -> torch.Tensor:
        keys, values, *scales = kv.layers[layer]
        rows = (batch.block_table, batch.query_start, batch.context_len)
        if scales:
            write, attention = (getattr(self.kernels, op) for op in OVER_CODES[keys.dtype])
            q, k = self.kernels.rotate(q, *angles), self.kernels.rotate(k, *angles)
            k_scales, v_scales = scales
            write(k, v, keys, values, k_scales, v_scales, batch.slots)
            attended: torch.Tensor = attention(q, keys, values, k_scales, v_scales, *rows, *kind)
            return attended
        q = self.kernels.rotate_write_kv(q, k, v, *angles, keys, values, batch.slots)
        return self.kernels.paged_attention(q, keys, values, *rows, *kind)
