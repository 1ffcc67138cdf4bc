"""Attention through the op table: store this step's K and V in the pool, then attend over each request's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tuili import ops

if TYPE_CHECKING:
    from tuili.runtime.batch import ForwardBatch
    from tuili.runtime.kvstore import KVStore


class PagedAttention:
    """The AttentionBackend that runs everywhere. Writing before reading lets requests of one step share blocks."""

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
        ops.write_kv(k, v, keys, values, batch.slots)
        return ops.paged_attention(
            q, keys, values, batch.block_table, batch.query_start, batch.context_len, scale, window, softcap
        )
