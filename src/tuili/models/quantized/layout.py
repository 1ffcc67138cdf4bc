"""How files hold a rounded matrix [out, in], and how its codes come out of them: one class per arrangement.

``tests/quantized_files.py`` packs each from the published description, independently. Torch is imported where
weights are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tuili.base.errors import ModelError
from tuili.quant.scheme import BLOCK, GROUPS, Scheme

if TYPE_CHECKING:
    import torch

    from tuili.quant.weight import Codes

Shape = tuple[int, ...]
#: A module's tensors by the ends of their names.
Files = Mapping[str, "torch.Tensor"]
#: What safetensors calls the dtypes that scales may have, and whole numbers.
SCALES, INTEGERS = ("F32", "BF16", "F16"), ("I64", "I32")
#: AWQ: the column (of eight) whose code is in nibble p of a word, low first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Grid:
    """Each ``height`` outputs x ``width`` inputs share a scale; 0: all of them do."""

    height: int
    width: int

    def shape(self, out: int, into: int) -> tuple[int, int]:
        return _cells(out, self.height), _cells(into, self.width)

    def shapes(self, out: int, into: int) -> tuple[Shape, ...]:
        """The shapes that files give the scales: dimensions of one may be left out."""
        full = self.shape(out, into)
        return {(1, 1): (full, (1,), ()), (out, 1): (full, (out,))}.get(full, (full,))


def _cells(size: int, cell: int) -> int:
    return -(-size // cell) if cell else 1


def scheme_for(bits: int, floating: bool, grid: Grid, symmetric: bool, weight_only: bool, where: str) -> Scheme:
    """The scheme that holds such numbers as they are. ModelError, beginning with ``where``, if there is none."""
    if bits not in (4, 8) or (floating and bits != 8):
        kind = "floats" if floating else "integers"
        raise ModelError(f"{where}: {kind} of {bits} bits are not supported: expected integers of 4 or 8, floats of 8")
    block = grid.height > 1
    if block and (not floating or (grid.height, grid.width) != (BLOCK, BLOCK)):
        raise ModelError(f"{where}: blocks of {grid.height} x {grid.width} are not supported: only FP8's 128 x 128 are")
    group = grid.width if grid.width in GROUPS else BLOCK if grid.width % BLOCK == 0 and grid.width else 0
    if grid.width and not group:
        raise ModelError(f"{where}: group_size={grid.width} is not supported: expected 32, 64 or a multiple of 128")
    if bits == 4:
        return Scheme("int4", group or BLOCK, symmetric, weight_only)
    if not symmetric and (floating or not weight_only):
        raise ModelError(f"{where}: 8-bit weights with zero points and rounded activations are not supported")
    return Scheme("fp8" if floating else "int8", group, symmetric, weight_only, BLOCK if block else 1)


@dataclass(frozen=True)
class Layout(ABC):
    """``scheme``: what holds the same numbers here; ``grid``: which of them share a scale in the files."""

    scheme: Scheme
    grid: Grid
    #: Ends of names that may be there too.
    optional: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def dtypes(self) -> Mapping[str, tuple[str, ...]]:
        """The dtypes that those tensors may have, in safetensors' words, by the ends of their names."""

    @abstractmethod
    def tensors(self, out: int, into: int) -> dict[str, tuple[Shape, ...]]:
        """Ends of the names of what must be there, and the shapes that each may have."""

    @abstractmethod
    def scales(self, files: Files, out: int, into: int) -> torch.Tensor:
        """All scales, as ``grid`` has them."""

    @abstractmethod
    def codes(self, files: Files, scheme: Scheme, out: int, into: int, start: int, end: int) -> Codes:
        """Rows [start, end) as ``scheme`` wants them; it differs from ours only in where scales are repeated."""

    def check(self, module: str, files: Files, out: int, into: int) -> None:
        """ModelError for what the optional tensors say that is not supported."""
        for name in ("g_idx", "weight_g_idx"):
            if name in files:
                _refuse_order(f"{module}.{name}", files[name], into, self.grid.width or into)
        if "weight_shape" in files and files["weight_shape"].tolist() != [out, into]:
            raise ModelError(f"{module}.weight_shape is {files['weight_shape'].tolist()}, not {[out, into]}")

    def _fit(self, values: torch.Tensor, scheme: Scheme, into: int, start: int, end: int) -> torch.Tensor:
        """Of ``values`` [grid] those of rows [start, end), repeated where ``scheme`` wants more of them."""
        import torch

        if scheme.height > 1:
            lines = values[start // scheme.height : -(-end // scheme.height)]
        elif self.grid.height:
            lines = values[torch.arange(start, end) // self.grid.height]
        else:
            lines = values.expand(end - start, -1)
        width = scheme.group or into
        return lines[:, torch.arange(_cells(into, scheme.group)) * width // (self.grid.width or into)]


def _refuse_order(name: str, order: torch.Tensor, into: int, width: int) -> None:
    """Inputs in the order of their activations belong to groups that are not contiguous: no kernel takes them."""
    import torch

    if not torch.equal(order.long(), torch.arange(into) // width):
        raise ModelError(
            f"{name}: groups are in the order of the activations (desc_act, actorder=group), which is not supported; "
            "quantize without it, or with actorder=weight"
        )


# Codes in words of 32 bits --------------------------------------------------------------------------------------------


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` unsigned codes of each row of ``words`` int32 [rows, n], low bits first: uint8."""
    import torch

    fields = words.reshape(-1).view(torch.uint8).view(len(words), 4 * words.shape[1])
    if bits == 4:
        fields = torch.stack((fields & 15, fields >> 4), -1).flatten(1)
    return fields[:, :count]


def _signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes as ``Codes`` wants them: of 8 bits 128 less, as int8."""
    import torch

    return codes if bits == 4 else (codes ^ 128).view(torch.int8)


# Compressed-tensors, and FP8 of transformers and vLLM -----------------------------------------------------------------

#: What describes a matrix and the activations that were seen before it.
INPUTS = {
    "weight_shape": INTEGERS,
    "weight_g_idx": INTEGERS,
    "input_scale": SCALES,
    "input_zero_point": ("I8", "F8_E4M3", *INTEGERS, *SCALES),
}


@dataclass(frozen=True)
class ByteLayout(Layout):
    """``weight`` [out, in] int8 (of 4 bits too) or float8; ``scale`` ends the name of its scales, which multiply."""

    scale: str = "weight_scale"
    optional = frozenset({"weight_zero_point", "weight_shape", "weight_g_idx", "input_scale", "input_zero_point"})

    @property
    def dtypes(self) -> Mapping[str, tuple[str, ...]]:
        code = "F8_E4M3" if self.scheme.format == "fp8" else "I8"
        zeros = {"weight_zero_point": (code, "I8", *(INTEGERS + SCALES if self.scheme.symmetric else ()))}
        return INPUTS | zeros | {"weight": (code,), self.scale: SCALES}

    def tensors(self, out: int, into: int) -> dict[str, tuple[Shape, ...]]:
        shapes = self.grid.shapes(out, into)
        zeros = {} if self.scheme.symmetric else {"weight_zero_point": shapes}
        return {"weight": ((out, into),), self.scale: shapes} | zeros

    def check(self, module: str, files: Files, out: int, into: int) -> None:
        super().check(module, files, out, into)
        if self.scheme.symmetric and "weight_zero_point" in files and bool(files["weight_zero_point"].float().any()):
            raise ModelError(f"{module}.weight_zero_point is not zero, and config.json says symmetric")

    def scales(self, files: Files, out: int, into: int) -> torch.Tensor:
        return files[self.scale].reshape(self.grid.shape(out, into))

    def codes(self, files: Files, scheme: Scheme, out: int, into: int, start: int, end: int) -> Codes:
        from tuili.quant.weight import Codes

        values, zeros = files["weight"][start:end], None
        if not scheme.symmetric:
            zeros = self._fit(files["weight_zero_point"].reshape(self.grid.shape(out, into)), scheme, into, start, end)
        if scheme.format == "int4":
            values, zeros = _nibbles(values), None if zeros is None else _nibbles(zeros)
        return Codes(values, self._fit(self.scales(files, out, into), scheme, into, start, end), zeros)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """-8..7 as 0..15."""
    import torch

    return (codes + 8).to(torch.uint8)


@dataclass(frozen=True)
class Packed(Layout):
    """``weight_packed`` [out, words] along the inputs; zero points packed along the outputs."""

    bits: int = 4
    optional = frozenset({"weight_shape", "weight_g_idx", "input_scale", "input_zero_point"})

    @property
    def dtypes(self) -> Mapping[str, tuple[str, ...]]:
        return INPUTS | {"weight_packed": ("I32",), "weight_scale": SCALES, "weight_zero_point": ("I32",)}

    def tensors(self, out: int, into: int) -> dict[str, tuple[Shape, ...]]:
        scales = self.grid.shape(out, into)
        zeros: dict[str, tuple[Shape, ...]] = {"weight_zero_point": ((_words(scales[0], self.bits), scales[1]),)}
        packed: dict[str, tuple[Shape, ...]] = {
            "weight_packed": ((out, _words(into, self.bits)),),
            "weight_scale": self.grid.shapes(out, into),
        }
        return packed if self.scheme.symmetric else packed | zeros

    def scales(self, files: Files, out: int, into: int) -> torch.Tensor:
        return files["weight_scale"].reshape(self.grid.shape(out, into))

    def codes(self, files: Files, scheme: Scheme, out: int, into: int, start: int, end: int) -> Codes:
        from tuili.quant.weight import Codes

        values = _signed(unpack_words(files["weight_packed"][start:end], self.bits, into), self.bits)
        scales, zeros = self._fit(self.scales(files, out, into), scheme, into, start, end), None
        if not scheme.symmetric:
            lines = self.grid.shape(out, into)[0]
            all_zeros = _signed(unpack_words(files["weight_zero_point"].T, self.bits, lines), self.bits).T
            zeros = self._fit(all_zeros, scheme, into, start, end)
        return Codes(values, scales, zeros)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


# GPTQ and AWQ: the matrix lies transposed -----------------------------------------------------------------------------

WORDS = {"qweight": ("I32",), "qzeros": ("I32",), "scales": SCALES, "g_idx": INTEGERS}


@dataclass(frozen=True)
class Gptq(Layout):
    """``qweight`` [in words, out] packed along the inputs, ``qzeros`` [groups, out words] along the outputs.

    ``shift`` is what was taken off the zero points: 1 in version 1 of the format, 0 in version 2.
    """

    bits: int = 4
    shift: int = 1
    optional = frozenset({"g_idx", "bias"})
    dtypes = WORDS

    def tensors(self, out: int, into: int) -> dict[str, tuple[Shape, ...]]:
        groups = self.grid.shape(out, into)[1]
        return {
            "qweight": ((_words(into, self.bits), out),),
            "qzeros": ((groups, _words(out, self.bits)),),
            "scales": ((groups, out),),
        }

    def check(self, module: str, files: Files, out: int, into: int) -> None:
        super().check(module, files, out, into)
        if "bias" in files and bool(files["bias"].any()):
            raise ModelError(f"{module}.bias is not zero, and config.json says that there is none")
        if self.scheme.symmetric and bool((self._zeros(files, out) != 1 << (self.bits - 1)).any()):
            raise ModelError(f"{module}.qzeros: config.json says sym=true, and zero points are not all in the middle")

    def _zeros(self, files: Files, out: int) -> torch.Tensor:
        """[groups, out], unsigned."""
        return unpack_words(files["qzeros"], self.bits, out) + self.shift & (1 << self.bits) - 1

    def scales(self, files: Files, out: int, into: int) -> torch.Tensor:
        return files["scales"].T

    def codes(self, files: Files, scheme: Scheme, out: int, into: int, start: int, end: int) -> Codes:
        from tuili.quant.weight import Codes

        values = _signed(unpack_words(files["qweight"][:, start:end].T, self.bits, into), self.bits)
        scales, zeros = self._fit(files["scales"].T, scheme, into, start, end), None
        if not scheme.symmetric:
            zeros = self._fit(_signed(self._zeros(files, out), self.bits).T, scheme, into, start, end)
        return Codes(values, scales, zeros)


@dataclass(frozen=True)
class Awq(Layout):
    """``qweight`` [in, out words] and ``qzeros`` [groups, out words], columns of a word in AWQ's order."""

    dtypes = WORDS

    def tensors(self, out: int, into: int) -> dict[str, tuple[Shape, ...]]:
        groups = self.grid.shape(out, into)[1]
        return {"qweight": ((into, _words(out, 4)),), "qzeros": ((groups, _words(out, 4)),), "scales": ((groups, out),)}

    def scales(self, files: Files, out: int, into: int) -> torch.Tensor:
        return files["scales"].T

    def codes(self, files: Files, scheme: Scheme, out: int, into: int, start: int, end: int) -> Codes:
        from tuili.quant.weight import Codes

        values = unpack_awq(files["qweight"][:, start // 8 : -(-end // 8)])[:, start % 8 :][:, : end - start].T
        zeros = self._fit(unpack_awq(files["qzeros"]).T, scheme, into, start, end)
        return Codes(values.contiguous(), self._fit(files["scales"].T, scheme, into, start, end), zeros)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """``words`` int32 [rows, n] as codes [rows, 8 n] in the order of the columns."""
    nibbles = unpack_words(words, 4, 8 * words.shape[1]).view(len(words), -1, 8)
    return nibbles[..., sorted(range(8), key=AWQ_ORDER.__getitem__)].flatten(1)
