"""How fast decoding will be: a step takes as long as reading its bytes, or in a large batch as its products.

Predicted tokens/s = requests / max(bytes of a step / bandwidth, operations of a step / peak). What attention computes
and what the host adds is not in it: an upper bound that a good engine comes close to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuili.base.errors import ConfigError
from tuili.layers.sizes import step_kv_bytes, step_products, step_weight_bytes
from tuili.layers.spec import ModelSpec
from tuili.plan.memory import Kept


@dataclass(frozen=True)
class DecodeStep:
    """One decode step of ``requests``: bytes of weights and KV that it reads, operations of its matrices."""

    requests: int
    weights: int
    kv: int
    operations: int

    @property
    def bytes(self) -> int:
        return self.weights + self.kv

    def seconds(self, bandwidth: float, peak: float | None = None) -> float:
        """At ``bandwidth`` bytes/s and, where given, ``peak`` operations/s."""
        if bandwidth <= 0 or (peak is not None and peak <= 0):
            raise ConfigError(
                f"bandwidth={bandwidth} and peak={peak} must be positive, in bytes and operations per second"
            )
        return max(self.bytes / bandwidth, self.operations / peak if peak else 0.0)

    def rate(self, bandwidth: float, peak: float | None = None) -> float:
        """Tokens per second of all requests together."""
        return self.requests / self.seconds(bandwidth, peak)


def decode_step(spec: ModelSpec, kept: Kept, contexts: Sequence[int], kv_dtype: str = "auto") -> DecodeStep:
    """The step that computes one token for a request at each of ``contexts`` (positions, the new one included)."""
    dtype, scheme = kept
    kv_dtype = dtype if kv_dtype == "auto" else kv_dtype
    rows = len(contexts)
    return DecodeStep(
        requests=rows,
        weights=step_weight_bytes(spec, dtype, scheme, rows),
        kv=step_kv_bytes(spec, contexts, kv_dtype),
        operations=rows * step_products(spec),
    )


def peak_kind(kept: Kept) -> str:
    """The kind of products of a model ``kept`` so: where activations are rounded, integer weights times int8."""
    dtype, scheme = kept
    if scheme is not None and scheme.format in ("int8", "int4") and not scheme.weight_only:
        return scheme.format
    return "bfloat16" if dtype == "bfloat16" else "float32"
