"""Attention through the op table: store this step's K and V in the pool, then attend over each request's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tuili import ops

if TYPE_CHECKING:
    from tuili.runtime.batch import ForwardBatch
    from tuili.runtime.kvstore import KVStore


class PagedAttention:
    """The AttentionBackend that runs everywhere. Writing before reading lets requests of one step share blocks, and a
    step's own K and V are read as later steps will read them (rounded, in an int8 pool)."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        batch: ForwardBatch,
        kv: KVStore,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        keys, values = kv.layer(layer)
        rows = (batch.block_table, batch.query_start, batch.context_len)
        if kv.int8:
            k_scales, v_scales = kv.scales(layer)
            ops.write_kv_int8(k, v, keys, values, k_scales, v_scales, batch.slots)
            return ops.paged_attention_int8(q, keys, values, k_scales, v_scales, *rows, scale, window, softcap)
        ops.write_kv(k, v, keys, values, batch.slots)
        return ops.paged_attention(q, keys, values, *rows, scale, window, softcap)
