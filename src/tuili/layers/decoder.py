"""The decoder that families share: embed, blocks, final norm, head. A family differs by its ``ModelSpec``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from tuili.layers.attention import Attention, Batch
from tuili.layers.build import REFERENCES, Build
from tuili.layers.linear import Embedding, Linear, Matrix
from tuili.layers.mlp import GatedMLP
from tuili.layers.norm import RMSNorm
from tuili.layers.rope import Angles, Rope
from tuili.layers.spec import ModelSpec
from tuili.quant.place import place_on
from tuili.quant.scheme import Scheme


class Block(nn.Module):
    """Pre-norm residual block; with ``spec.post_norms`` also a norm behind attention and MLP."""

    def __init__(self, spec: ModelSpec, layer: int, build: Build):
        super().__init__()
        norm = (spec.hidden_size, spec.norm_eps, spec.norm_offset, build)
        self.attention_norm = RMSNorm(*norm)
        self.attention = Attention(spec, layer, build)
        self.attention_post_norm = RMSNorm(*norm) if spec.post_norms else None
        self.mlp_norm = RMSNorm(*norm)
        self.mlp = GatedMLP(spec, build)
        self.mlp_post_norm = RMSNorm(*norm) if spec.post_norms else None

    def before(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All that comes before attention: queries, keys and values of what ``attention_norm`` made [n, hidden]."""
        return self.attention.project(normed)

    def after(self, x: torch.Tensor, attended: torch.Tensor, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """All that comes after it: the residual stream ``x`` as it goes to the next block, and as ``norm``, of whatever
        follows, makes it."""
        out = self.attention.merge(attended)
        x, out = self.mlp_norm.add(x, out if self.attention_post_norm is None else self.attention_post_norm(out))
        out = self.mlp(out)
        return norm.add(x, out if self.mlp_post_norm is None else self.mlp_post_norm(out))


class Decoder(nn.Module):
    """``embed``, ``forward`` and ``logits`` of DESIGN.md 5's Model. Everything in it computes with its ``kernels``."""

    def __init__(
        self, spec: ModelSpec, build: Build = REFERENCES, block: Callable[[ModelSpec, int, Build], Block] = Block
    ):
        super().__init__()
        self.spec, self.kernels = spec, build.kernels
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, spec.embed_scale, build)
        self.layers = nn.ModuleList(block(spec, i, build) for i in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, spec.norm_offset, build)
        self.head = None if spec.tied else Linear(spec.hidden_size, (spec.vocab_size,), False, build)
        self.rope: Rope | None = None
        self.window_rope: Rope | None = None

    def prepare(self, max_len: int) -> None:
        """Make the rotary tables for positions up to ``max_len``; call before the first forward."""
        device = self.norm.weight.device
        self.rope = Rope(self.spec.rope, max_len, device, self.kernels)
        self.window_rope = (
            Rope(self.spec.window_rope, max_len, device, self.kernels) if self.spec.window_rope else self.rope
        )

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    @property
    def norms(self) -> list[RMSNorm]:
        """What normalizes the residual stream before each block, and after the last."""
        return [*(block.attention_norm for block in self.blocks), self.norm]

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and KV."""
        return self.norm.weight.dtype

    def store(self, scheme: Scheme) -> None:
        """Keep every matrix as ``scheme`` says, where it is (``Scheme()``: in the kernels' order). Inference only."""
        place = place_on(self.norm.weight.device, self.kernels)
        for name, module in self.named_modules():
            if isinstance(module, Matrix):
                module.store(scheme.of(name), place)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [n] to the residual stream [n, hidden]."""
        return self.embedding(ids)

    def angles(self, positions: torch.Tensor) -> tuple[Angles, Angles]:
        """Rotary angles of ``positions`` [n]: of the layers with full attention, and of those with a window."""
        assert self.rope is not None
        assert self.window_rope is not None
        angles = self.rope.at(positions)
        return angles, angles if self.window_rope is self.rope else self.window_rope.at(positions)

    def forward(self, x: torch.Tensor, batch: Batch, kv: Any, taps: tuple[int, ...] = ()) -> Any:
        """``x`` [n, hidden] through all layers and the final norm: [n, hidden].

        With ``taps``, also the list of the residual streams that enter those layers (``num_layers``: after the last).
        """
        angles = self.angles(batch.positions)
        tapped = [x] if 0 in taps else []
        normed = self.norms[0](x)
        for i, (layer, norm) in enumerate(zip(self.blocks, self.norms[1:], strict=True)):
            q, k, v = layer.before(normed)
            del normed  # what is not needed any more gives its memory to what comes
            attended = layer.attention.attend(q, k, v, angles[self.spec.window(i) is not None], batch, kv)
            del q, k, v
            x, normed = layer.after(x, attended, norm)
            del attended
            if i + 1 in taps:
                tapped.append(x)
        return (normed, tapped) if taps else normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores [n, vocab] of the next token after each row of ``hidden`` [n, hidden], in the model's dtype."""
        scores = self.embedding.scores(hidden) if self.head is None else self.head(hidden)
        cap = self.spec.logit_softcap
        return scores if cap is None else self.kernels.softcap(scores, cap)
