"""``KVSpec``: what a layer keeps of every position, and how many bytes that takes. No torch.

Read by the store that allocates it, by planners, and by whoever moves blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuili.layers.spec import ModelSpec
from tuili.quant.formats import BYTES

#: Types of KV that are codes of a byte and a float32 scale per head.
SCALED = ("int8", "fp8")


@dataclass(frozen=True)
class KVSpec:
    """One layer's: keys of ``key_dim`` and values of ``value_dim`` numbers for each of ``heads``, in ``dtype``.

    ``window``: positions that are ever read again, counted back from the newest (None: all).
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: str
    window: int | None = None
    kind: str = "heads"

    @property
    def scaled(self) -> bool:
        """Whether keys and values are codes with a float32 scale per position and head."""
        return self.dtype in SCALED

    @property
    def value_bytes(self) -> int:
        """Of one number."""
        return 1 if self.scaled else BYTES[self.dtype]

    @property
    def position_bytes(self) -> int:
        """Of one position: numbers and scales."""
        return self.heads * ((self.key_dim + self.value_dim) * self.value_bytes + (8 if self.scaled else 0))

    def block_bytes(self, block_size: int) -> int:
        """Of one block as it is allocated. Halves and codes lie in pairs (of dimensions for keys, of positions for
        values), so that odd sizes are padded."""
        pair = 1 if self.dtype == "float32" else 2
        numbers = block_size * _up(self.key_dim, pair) + _up(block_size, pair) * self.value_dim
        return self.heads * (numbers * self.value_bytes + (8 * block_size if self.scaled else 0))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def kv_specs(spec: ModelSpec, dtype: str) -> tuple[KVSpec, ...]:
    """Of every layer of a model, where KV is kept in ``dtype`` (int8, fp8, or a float type)."""
    head = spec.num_kv_heads, spec.head_dim, spec.head_dim, dtype
    return tuple(KVSpec(*head, spec.window(layer)) for layer in range(spec.num_layers))
