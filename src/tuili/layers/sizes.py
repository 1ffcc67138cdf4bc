"""How large a decoder is, from its spec alone: parameters by name, bytes of weights, bytes of KV. No torch.

The one place of these formulas: the planner's tables and predictions are made of them, and tests hold them equal to the
tensors that layers, formats and the KV store allocate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from tuili.layers.kvspec import kv_specs
from tuili.layers.shapes import norms, projections
from tuili.layers.spec import ModelSpec
from tuili.quant.formats import BYTES, format_of
from tuili.quant.scheme import Scheme

Shape = tuple[int, ...]


def parameters(spec: ModelSpec) -> dict[str, Shape]:
    """The shape of every parameter of ``Decoder(spec)`` by its name. A tied head is the embedding, counted once."""
    found: dict[str, Shape] = {"embedding.weight": (spec.vocab_size, spec.hidden_size)}
    block = block_parameters(spec)
    for layer in range(spec.num_layers):
        found |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    found["norm.weight"] = (spec.hidden_size,)
    if not spec.tied:
        found["head.weight"] = (spec.vocab_size, spec.hidden_size)
    return found


def block_parameters(spec: ModelSpec) -> dict[str, Shape]:
    """Those of one block, projections fused as layers fuse them."""
    found: dict[str, Shape] = {}
    for name, (into, parts, bias) in projections(spec).items():
        found |= {f"{name}.weight": (sum(parts), into)} | ({f"{name}.bias": (sum(parts),)} if bias else {})
    return found | {f"{name}.weight": (length,) for name, length in norms(spec).items()}


def parameter_count(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in parameters(spec).values())


def weight_bytes(spec: ModelSpec, dtype: str, scheme: Scheme | None = None, kernels: str = "cpu") -> int:
    """Bytes of all weights. Without ``scheme`` as a checkpoint in ``dtype`` holds them (its tensors, without headers);
    else matrices stored by ``scheme``, padding included, and norms and biases in ``dtype``. What the checkpoint holds
    rounded is stored as it is, for ``kernels`` ("cpu" or "triton")."""
    return sum(named_bytes(spec, dtype, scheme, kernels).values())


def named_bytes(spec: ModelSpec, dtype: str, scheme: Scheme | None = None, kernels: str = "cpu") -> dict[str, int]:
    """``weight_bytes`` of every parameter by its name."""
    return {
        name: _bytes(shape, dtype, spec.scheme_of(name.removesuffix(".weight"), scheme), kernels)
        for name, shape in parameters(spec).items()
    }


def _bytes(shape: Shape, dtype: str, scheme: Scheme | None, kernels: str) -> int:
    if scheme is None or len(shape) == 1:
        return math.prod(shape) * BYTES[dtype]
    return format_of(scheme, kernels).bytes(shape[0], shape[1], scheme, dtype)


def step_weight_bytes(
    spec: ModelSpec, dtype: str, scheme: Scheme | None = None, rows: int = 1, kernels: str = "cpu"
) -> int:
    """Bytes of weights that a step of ``rows`` rows reads: every weight once, but of an embedding that is not the head
    too only the rows' own vectors."""
    each = named_bytes(spec, dtype, scheme, kernels)
    everything, embedding = sum(each.values()), each["embedding.weight"]
    if spec.tied:
        return everything
    return everything - embedding + rows * spec.hidden_size * embedding // (spec.vocab_size * spec.hidden_size)


def step_products(spec: ModelSpec) -> int:
    """Operations (a multiplication and an addition are two) of one row through every matrix, the head included."""
    matrices = sum(math.prod(shape) for shape in parameters(spec).values() if len(shape) == 2)
    return 2 * (matrices if spec.tied else matrices - spec.vocab_size * spec.hidden_size)


# KV ------------------------------------------------------------------------------------------------------------------


def kv_bytes_per_position(spec: ModelSpec, dtype: str) -> int:
    """Bytes of K and V of one position in all layers. int8, fp8: a code per value and a float32 scale per head."""
    return sum(layer.position_bytes for layer in kv_specs(spec, dtype))


def pool_bytes(spec: ModelSpec, num_blocks: int, block_size: int, dtype: str) -> int:
    """Bytes of a KV pool: every layer keeps every position of its blocks, windows or not."""
    return num_blocks * sum(layer.block_bytes(block_size) for layer in kv_specs(spec, dtype))


def step_kv_bytes(spec: ModelSpec, contexts: Iterable[int], dtype: str) -> int:
    """Bytes of K and V that attention reads to compute one row at the end of each of ``contexts`` (positions, the new
    one included): of a layer with a window only the window."""
    layers = kv_specs(spec, dtype)
    return sum(min(length, layer.window or length) * layer.position_bytes for length in contexts for layer in layers)
