"""The shapes of a block's projections and norms: declared here once, for the layers and for planners. No torch."""

from __future__ import annotations

from typing import NamedTuple

from tuili.layers.spec import ModelSpec


class Projection(NamedTuple):
    """A matrix from ``into`` inputs to all of ``parts``: the outputs of the projections fused into it, in order."""

    into: int
    parts: tuple[int, ...]
    bias: bool = False


def projections(spec: ModelSpec) -> dict[str, Projection]:
    """Those of one block, by their names in it."""
    hidden, inner, heads = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    keys = spec.num_kv_heads * spec.head_dim
    return {
        "attention.qkv_proj": Projection(hidden, (heads, keys, keys), spec.qkv_bias),
        "attention.o_proj": Projection(heads, (hidden,), spec.out_bias),
        "mlp.gate_up_proj": Projection(hidden, (inner, inner), spec.mlp_bias),
        "mlp.down_proj": Projection(inner, (hidden,), spec.mlp_bias),
    }


def norms(spec: ModelSpec) -> dict[str, int]:
    """Lengths of the norms of one block, by their names in it."""
    found = {"attention_norm": spec.hidden_size, "mlp_norm": spec.hidden_size}
    if spec.qk_norm:
        found |= {"attention.q_norm": spec.head_dim, "attention.k_norm": spec.head_dim}
    if spec.post_norms:
        found |= {"attention_post_norm": spec.hidden_size, "mlp_post_norm": spec.hidden_size}
    return found
