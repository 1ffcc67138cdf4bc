"""Logprobs of prompts: what the model thought of each token that it was given."""

from __future__ import annotations

import torch

from tuili.core.plan import Chunk, TopLogprobs
from tuili.layers.decoder import Decoder
from tuili.runtime.rows import Row
from tuili.runtime.sampler import Top, rank, read_logprobs

#: Rows of prompt logits computed at once: bounds memory at large vocabularies.
PROMPT_LOGITS_SLICE = 256


def is_judged(chunk: Chunk) -> bool:
    """Whether positions of the chunk are of a prompt whose logprobs are asked for."""
    return chunk.params.prompt_logprobs is not None and chunk.start < chunk.prompt_len


def judge_prompt(model: Decoder, chunk: Chunk, row: Row, ids: torch.Tensor, hidden: torch.Tensor) -> list[Top]:
    """Of prompt positions ``max(1, start) .. min(start + count, prompt_len) - 1``, in slices, on the device.

    ``ids`` [count], ``hidden`` [count, hidden]: the chunk's positions. A position is judged by the hidden state before
    it: the first one's came with the chunk before.
    """
    sources = hidden if row.before is None else torch.cat((row.before, hidden))
    targets = ids if row.before is not None else ids[1:]
    targets = targets[: chunk.prompt_len - max(chunk.start, 1)]
    row.before = hidden[-1:].clone()
    parts = zip(sources.split(PROMPT_LOGITS_SLICE), targets.split(PROMPT_LOGITS_SLICE), strict=False)
    count = chunk.params.prompt_logprobs or 0
    return [
        rank(model.logits(source[: len(target)]), target, count, model.kernels)
        for source, target in parts
        if len(target)
    ]


def read_judged(chunk: Chunk, judged: list[Top]) -> list[TopLogprobs]:
    """What ``judge_prompt`` found, on the CPU, as numbers."""
    count = chunk.params.prompt_logprobs or 0
    return [entry for top in judged for entry in read_logprobs(top, [count] * len(top[0]))]
