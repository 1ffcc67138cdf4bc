"""Text from a model in training: a loop apart from the engine.

On purpose: a run can show samples when the engine is broken, and the loop is its oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from tuili.layers.attention import Kind
from tuili.layers.decoder import Decoder
from tuili.layers.rope import Angles
from tuili.train.kernels import TRAIN
from tuili.train.tokenizer import END, START


class CachedAttention:
    """Causal attention of one text: its first rows at once, then row by row over those before."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: Angles,
        layer: int,
        batch: SampledRows,
        kv: Any,
        kind: Kind,
    ) -> torch.Tensor:
        """``q`` [n, heads, dim], ``k``, ``v`` [n, kv_heads, dim] to [n, heads, dim]; n is 1 but for the first rows."""
        assert kind == Kind(kind.scale), "no recipe makes a model with windows or caps"
        q, k = TRAIN.rotate(q, *angles), TRAIN.rotate(k, *angles)
        if layer not in self.kept:
            self.kept[layer] = k, v
            return TRAIN.causal_attention(q[None], k[None], v[None], kind.scale)[0]
        k, v = (torch.cat(pair) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = k, v
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=kind.scale, enable_gqa=True)[0].transpose(0, 1)


@dataclass(frozen=True)
class SampledRows:
    """The newest rows of a text. Satisfies ``layers.attention.Batch``."""

    positions: torch.Tensor
    attention: CachedAttention


@torch.no_grad()
def generate(
    model: Decoder, ids: list[int], limit: int, temperature: float, top_p: float, generator: torch.Generator
) -> list[int]:
    """Up to ``limit`` ids that follow ``ids``, end-of-sequence left out; ``temperature`` 0 is greedy."""
    device, attention = model.embedding.weight.device, CachedAttention()
    made: list[int] = []
    fresh = ids
    while len(made) < limit and len(ids) + len(made) < model.spec.max_model_len:
        row = torch.tensor(fresh, device=device)
        end = len(ids) + len(made)
        rows = SampledRows(torch.arange(end - len(fresh), end, device=device), attention)
        hidden = model(model.embed(row), rows, None)
        scores = model.logits(hidden[-1:])[0].float().cpu()
        token = pick(scores, temperature, top_p, generator)
        if token in model.spec.eos_token_ids:
            break
        made.append(token)
        fresh = [token]
    return made


def pick(scores: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token drawn from ``scores`` [vocab] among the likeliest that together reach ``top_p``."""
    if temperature == 0:
        return int(scores.argmax())
    chances, order = (scores / temperature).softmax(-1).sort(descending=True)
    chances[chances.cumsum(-1) - chances >= top_p] = 0
    return int(order[torch.multinomial(chances, 1, generator=generator)])


def continuation(model: Decoder, tokenizer: Tokenizer, opening: str, limit: int, generator: torch.Generator) -> str:
    """``opening`` and what the model makes of it as raw text, drawn at temperature 0.7, top-p 0.9."""
    ids = tokenizer.encode(opening).ids
    return opening + tokenizer.decode(generate(model, ids, limit, 0.7, 0.9, generator))


def answer(model: Decoder, tokenizer: Tokenizer, prompt: str, limit: int, generator: torch.Generator) -> str:
    """The model's answer to a user's message, drawn at temperature 0.7, top-p 0.9."""
    ids = tokenizer.encode(f"{START}user\n{prompt}{END}\n{START}assistant\n").ids
    return tokenizer.decode(generate(model, ids, limit, 0.7, 0.9, generator))
