"""``ForwardBatch``: the rows of all requests of a step, end to end, as tensors; prefill and decode are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tuili.layers.attention import AttentionBackend


@dataclass(frozen=True)
class ForwardBatch:
    """``n`` rows of ``r`` requests.

    ``positions``, ``slots`` (where K and V go) [n]; ``query_start`` [r + 1] bounds each request's rows; ``context_len``
    [r] counts its positions after the step; ``block_table`` [r, blocks].
    """

    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    attention: AttentionBackend


def assemble(
    rows: torch.Tensor,
    starts: torch.Tensor,
    bounds: torch.Tensor,
    count: int,
    max_query_len: int,
    table: torch.Tensor,
    block_size: int,
    attention: AttentionBackend,
) -> ForwardBatch:
    """The batch of requests with ``rows`` [r] of ``table`` [rows, blocks] int64, from positions ``starts`` [r] on:
    ``count`` positions in all, between ``bounds`` [r + 1].

    Launches only, nothing is read back, and O(batch), whatever the context (law 13). The block table is as wide as it
    can get, so that shapes say nothing of the contexts.
    """
    if count == len(rows):
        owners, positions = rows, starts
    else:
        at = torch.arange(count, device=rows.device)
        request = torch.searchsorted(bounds, at, right=True) - 1
        owners, positions = rows[request], at - bounds[request] + starts[request]
    slots = table[owners, positions // block_size] * block_size + positions % block_size
    return ForwardBatch(positions, slots, bounds, starts + bounds.diff(), table[rows], max_query_len, attention)
