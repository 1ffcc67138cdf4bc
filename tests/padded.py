"""The op table's "padded" backend, for tests: attention that reads nothing back to the host, in plain torch.

Every query attends over its whole block table, masked; so steps can be captured, as with Triton's kernels, and at a
speed that allows a matrix of tests. The other ops are the references.
"""

from __future__ import annotations

import torch

from tuili import ops
from tuili.ops.kvcache import cached_keys, cached_values

NAME = "padded"


@ops.implement("paged_attention", NAME)
def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    at = torch.arange(len(q), device=q.device)
    request = torch.searchsorted(query_start, at, right=True) - 1
    position = (context_len[request] - (query_start[request + 1] - at)).unsqueeze(1)
    blocks = block_table[request]
    keys = cached_keys(k_cache, blocks, q.shape[-1]).flatten(1, 2).float()
    values = cached_values(v_cache, blocks, k_cache.shape[-2]).flatten(1, 2).float()
    group = q.shape[1] // keys.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (keys, values))
    scores = torch.einsum("nhd,nkhd->nhk", q.float(), keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    key = torch.arange(keys.shape[1], device=q.device).unsqueeze(0)
    seen = key <= position
    if window is not None:
        seen &= key > position - window
    values = torch.where(seen[:, :, None, None], values, 0.0)  # a weight of 0 would not hide a nan
    weights = torch.where(seen.unsqueeze(1), scores, -torch.inf).softmax(-1)
    return torch.einsum("nhk,nkhd->nhd", weights, values).to(q.dtype)
