"""The op table's "cpu" implementations of argmax, draw and logprobs: no copy of the logits, no sort of a row."""

from __future__ import annotations

import torch

from tuili.ops.cpu import library as lib
from tuili.ops.cpu.kernels import CODES, _rows, _suits
from tuili.ops.table import implement, table


@implement("argmax", "cpu")
def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not _suits(logits):
        return table["argmax"].reference(logits)
    x = _rows(logits)
    ids, finite = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x), dtype=torch.bool)
    lib.call("argmax", lib.ArgmaxArgs(*(t.data_ptr() for t in (x, ids, finite)), *_sizes(x)))
    return ids, finite


@implement("draw", "cpu")
def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _suits(logits):
        return table["draw"].reference(logits, temperature, min_p, top_k, top_p, uniform)
    x, wishes = _rows(logits), [t.contiguous() for t in (temperature, min_p, top_k, top_p, uniform)]
    ids, finite = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x), dtype=torch.bool)
    lib.call("draw", lib.DrawArgs(*(t.data_ptr() for t in (x, *wishes, ids, finite)), *_sizes(x)))
    return ids, finite


@implement("logprobs", "cpu")
def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not _suits(logits):
        return table["logprobs"].reference(logits, tokens, count)
    x, tokens = _rows(logits), tokens.contiguous()
    values, ranks = torch.empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    top, ids = torch.empty(len(x), count), torch.empty(len(x), count, dtype=torch.int64)
    tensors = (x, tokens, values, ranks, top, ids)
    lib.call("logprobs", lib.LogprobsArgs(*(t.data_ptr() for t in tensors), *_sizes(x), count))
    return values, ranks, top, ids


def _sizes(x: torch.Tensor) -> tuple[int, int, int, int]:
    return len(x), x.shape[1], x.stride(0), CODES[x.dtype]
