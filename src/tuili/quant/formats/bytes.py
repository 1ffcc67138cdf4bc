"""8 bits as files hold them, [out, in], int8 or float8 E4M3: float32 scales (int8 may have zeros too) for an output, a
group of its inputs, or a block; times activations that are rounded alike per row (W8A8), or not (W8A16).

For Triton's kernels; on a CPU torch's references multiply, exact and slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuili.base.errors import ConfigError
from tuili.quant.formats import Stored, Tensors, WeightFormat, formats, up
from tuili.quant.scheme import BLOCK, GROUPS, Scheme

if TYPE_CHECKING:
    import torch

    from tuili.quant.weight import Codes, Weight


@formats.register("bytes")
class Bytes(WeightFormat):
    numbers, packings, fast = ("int8", "fp8"), ("cpu", "triton"), ("triton",)

    def takes(self, scheme: Scheme, packing: str) -> bool:
        """On a CPU what ``int8`` does not take."""
        more = packing == "triton" or scheme.format == "fp8" or scheme.group or not scheme.symmetric
        return super().takes(scheme, packing) and bool(more)

    def tensors(self, out: int, into: int, scheme: Scheme, dtype: str) -> dict[str, Stored]:
        _check(scheme)
        shape = (up(out, scheme.height), up(into, scheme.group) if scheme.group else 1)
        codes = Stored((out, into), "float8_e4m3fn" if scheme.format == "fp8" else "int8")
        found = {"codes": codes, "scales": Stored(shape, "float32", scheme.height)}
        return found if scheme.symmetric else found | {"zeros": Stored(shape, "int8", scheme.height)}

    def pack(self, codes: Codes, scheme: Scheme) -> Tensors:
        packed = {"codes": codes.values, "scales": codes.scales}
        return packed if codes.zeros is None else packed | {"zeros": codes.zeros}

    def dequant(self, weight: Weight) -> torch.Tensor:
        from tuili.ops.triton.layouts import byte_floats

        t = weight.tensors
        return byte_floats(t["codes"], t["scales"], t.get("zeros")).to(weight.dtype)

    def matmul(self, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        t = weight.tensors
        if weight.scheme.weight_only:
            return weight.kernels.byte_weight_only_linear(x, t["codes"], t["scales"], bias, t.get("zeros"))
        return weight.kernels.byte_linear(x, t["codes"], t["scales"], bias)

    def rows(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        t = weight.tensors
        return weight.kernels.byte_embedding(ids, t["codes"], t["scales"], t.get("zeros"), weight.dtype)


def _check(scheme: Scheme) -> None:
    """ConfigError for what kernels do not take."""
    if scheme.group not in (0, *GROUPS):
        raise ConfigError(f"{scheme.format} with group={scheme.group}: the group must be one of {GROUPS}, or 0")
    if scheme.height not in (1, BLOCK) or (scheme.height == BLOCK and scheme.group != BLOCK):
        raise ConfigError(f"{scheme.format} in blocks of {scheme.height} x {scheme.group}: only {BLOCK} x {BLOCK} is")
    if not scheme.symmetric and (scheme.format == "fp8" or not scheme.weight_only):
        raise ConfigError(f"{scheme}: zero points go with int8 weights and activations that are not rounded")
