"""The plainest use of a ``Decoder``: one sequence, its own paged cache, no scheduler. Models are tested through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tuili import ops
from tuili.layers.attention import Kind
from tuili.layers.decoder import Decoder
from tuili.layers.rope import Angles
from tuili.ops.kvcache import key_shape, value_shape

BLOCK = 16


@dataclass
class Rows:
    """The batch that layers see: ``positions`` [n] of one sequence."""

    positions: torch.Tensor
    attention: Any


class Naive:
    """Feeds tokens of one sequence, in chunks of any size, and keeps their K and V."""

    def __init__(self, model: Decoder, max_len: int = 256):
        spec = model.spec
        self.model, self.length = model, 0
        blocks = -(-max_len // BLOCK)
        sizes = (blocks, BLOCK, spec.num_kv_heads, spec.head_dim, model.dtype)
        shapes = (key_shape(*sizes), value_shape(*sizes))
        self.cache = [[torch.zeros(s, dtype=model.dtype) for s in shapes] for _ in range(spec.num_layers)]
        self.table = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).unsqueeze(0)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: Angles,
        layer: int,
        batch: Rows,
        kv: Any,
        kind: Kind,
    ) -> torch.Tensor:
        at = batch.positions
        q, k = ops.rotate(q, *angles), ops.rotate(k, *angles)
        keys, values = self.cache[layer]
        ops.write_kv(k, v, keys, values, self.table[0, at // BLOCK] * BLOCK + at % BLOCK)
        start, context = torch.tensor([0, len(at)]), at[-1:] + 1
        return ops.paged_attention(q, keys, values, self.table, start, context, *kind)

    @torch.no_grad()
    def feed(self, ids: list[int]) -> torch.Tensor:
        """Scores after each of ``ids``, which follow what was fed before: [len(ids), vocab]."""
        batch = Rows(torch.arange(self.length, self.length + len(ids)), self)
        self.length += len(ids)
        return self.model.logits(self.model(self.model.embed(torch.tensor(ids)), batch, None))


def greedy(model: Decoder, ids: list[int], count: int, chunk: int = 256) -> list[int]:
    """``count`` tokens after ``ids``, which are prefilled ``chunk`` at a time."""
    run, out = Naive(model), []
    for first in range(0, len(ids), chunk):
        logits = run.feed(ids[first : first + chunk])
    for _ in range(count):
        out.append(int(logits[-1].argmax()))
        logits = run.feed(out[-1:])
    return out
