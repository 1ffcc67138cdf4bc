"""Text from a model in training: the naive loop that computes the whole context for every token.

Apart from the engine on purpose: a run can show samples when the engine is broken, and the loop is its oracle.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from tuili.layers.decoder import Decoder
from tuili.train.batch import TrainBatch
from tuili.train.tokenizer import END, START


@torch.no_grad()
def generate(
    model: Decoder, ids: list[int], limit: int, temperature: float, top_p: float, generator: torch.Generator
) -> list[int]:
    """Up to ``limit`` ids that follow ``ids``, end-of-sequence left out; ``temperature`` 0 is greedy."""
    device = model.embedding.weight.device
    made: list[int] = []
    while len(made) < limit and len(ids) + len(made) < model.spec.max_model_len:
        row = torch.tensor(ids + made, device=device)
        batch = TrainBatch(row, row, torch.arange(len(row), device=device), (0, len(row)))
        hidden = model(model.embed(row), batch, None)
        scores = model.logits(hidden[-1:])[0].float().cpu()
        token = pick(scores, temperature, top_p, generator)
        if token in model.spec.eos_token_ids:
            break
        made.append(token)
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
