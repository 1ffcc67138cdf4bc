"""Small quantized checkpoints of every file format, packed in numpy from the formats' published descriptions.

``make_quantized(plain, kind, folder)`` replaces the linear layers of a plain checkpoint: random codes and scales in the
files of one folder, the floats that they mean in another. Nothing of Tuili is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


# Packing --------------------------------------------------------------------------------------------------------------


def ct_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes [rows, columns] as words, low bits first along the columns, dense."""
    shifted = (codes.astype(np.int64) + (1 << (bits - 1))).astype(np.uint64)
    rows, columns = shifted.shape
    words = np.zeros((rows, -(-columns * bits // 32)), np.uint64)
    for column in range(columns):
        word, bit = divmod(column * bits, 32)
        words[:, word] |= (shifted[:, column] << np.uint64(bit)) & np.uint64(0xFFFFFFFF)
        if bit + bits > 32:
            words[:, word + 1] |= shifted[:, column] >> np.uint64(32 - bit)
    return words.astype(np.uint32)


def gptq_pack(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """Unsigned codes [in, out] as words [in * bits / 32, out]."""
    count = 32 // bits
    return sum(codes[i::count].astype(np.uint32) << np.uint32(bits * i) for i in range(count))


def awq_pack(codes: np.ndarray) -> np.ndarray:
    """Unsigned codes [rows, columns] as words [rows, columns / 8]."""
    return sum(codes[:, AWQ_ORDER[place] :: 8].astype(np.uint32) << np.uint32(4 * place) for place in range(8))


def words(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.uint32)).view(np.int32).copy())


# The kinds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """``write(out, into, random)``: a module's tensors by the ends of their names, and the matrix that they mean."""

    name: str
    config: dict[str, Any]
    write: Callable[[int, int, np.random.Generator], tuple[Tensors, torch.Tensor]]
    #: Whether activations stay floats.
    weight_only: bool = True
    kept: tuple[str, ...] = field(default=("lm_head",))


def numbers(random: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Scales around a fifth of a hundredth, exact in ``dtype``."""
    return torch.from_numpy((0.5 + random.random(shape)) / 150).to(dtype)


def spread(values: torch.Tensor, out: int, into: int, height: int, width: int) -> torch.Tensor:
    """A number for each weight. 0: for all of the outputs, or inputs."""
    tall = values.expand(out, -1) if not height else values.repeat_interleave(height, 0)[:out]
    return tall.expand(-1, into) if not width else tall.repeat_interleave(width, 1)[:, :into]


def meaning(codes: Any, zeros: Any, scales: torch.Tensor, height: int, width: int) -> torch.Tensor:
    codes = torch.as_tensor(codes).float()
    offset = 0.0 if zeros is None else spread(torch.as_tensor(zeros).float(), *codes.shape, height, width)
    return (codes - offset) * spread(scales.float(), *codes.shape, height, width)


def _cells(size: int, cell: int) -> int:
    return -(-size // cell) if cell else 1


def ct(
    name: str,
    bits: int,
    strategy: str,
    width: int = 0,
    symmetric: bool = True,
    activations: dict[str, Any] | None = None,
    scale: torch.dtype = torch.bfloat16,
    packed: bool = True,
) -> Kind:
    """compressed-tensors' integers."""
    height = 0 if strategy == "tensor" else 1

    def write(out: int, into: int, random: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        codes = random.integers(low, high, (out, into))
        scales = numbers(random, _cells(out, height), _cells(into, width), dtype=scale) * (1 if bits == 4 else 0.1)
        zeros = None if symmetric else random.integers(low, high, scales.shape)
        files: Tensors = {"weight_scale": scales if height else scales[0]}
        if packed:
            files |= {"weight_packed": words(ct_pack(codes, bits)), "weight_shape": torch.tensor([out, into])}
            files |= {} if zeros is None else {"weight_zero_point": words(ct_pack(zeros.T, bits).T)}
        else:
            files |= {"weight": torch.from_numpy(codes.astype(np.int8))}
            files |= {} if zeros is None else {"weight_zero_point": torch.from_numpy(zeros.astype(np.int8))}
        if activations and not activations["dynamic"]:
            files |= {"input_scale": torch.tensor([0.02]), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
        return files, meaning(codes, zeros, scales, height, width)

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights | {"group_size": width or None}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized" if packed else "int-quantized"}
    config |= {"config_groups": {"group_0": group | {"input_activations": activations}}, "ignore": ["lm_head"]}
    return Kind(name, config, write, activations is None)


def float8(random: np.random.Generator, out: int, into: int) -> torch.Tensor:
    return torch.from_numpy(random.normal(0, 90, (out, into)).clip(-448, 448)).to(torch.float8_e4m3fn)


def fp8(name: str, height: int, width: int, config: dict[str, Any], ending: str, weight_only: bool = False) -> Kind:
    def write(out: int, into: int, random: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        codes = float8(random, out, into)
        scales = numbers(random, _cells(out, height), _cells(into, width), dtype=torch.float32) / 9
        files = {"weight": codes, ending: scales if height else scales.view(1)}
        if config.get("activation_scheme") == "static":
            files |= {"input_scale": torch.tensor(0.5), ending: scales.view(())}
        return files, meaning(codes.float(), None, scales, height, width)

    return Kind(name, config, write, weight_only)


def ct_fp8(name: str, strategy: str, height: int, width: int, dynamic: bool = True, weight_only: bool = False) -> Kind:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    weights |= {"block_structure": [128, 128]} if strategy == "block" else {}
    rounded = {"num_bits": 8, "type": "float", "dynamic": dynamic, "strategy": "token", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None if weight_only else rounded}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["re:.*lm_head"]}
    return fp8(name, height, width, config | {"config_groups": {"a": group}}, "weight_scale", weight_only)


def gptq(name: str, bits: int, width: int, symmetric: bool, version: str | None, **more: Any) -> Kind:
    def write(out: int, into: int, random: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        groups, middle = _cells(into, width), 1 << (bits - 1)
        codes = random.integers(0, 2 * middle, (into, out))
        scales = numbers(random, groups, out) * (1 if bits == 4 else 0.1)
        zeros = np.full((groups, out), middle) if symmetric else random.integers(1, 2 * middle, (groups, out))
        stored = zeros - (version != "gptq_v2")
        files = {
            "qweight": words(gptq_pack(codes, bits)),
            "qzeros": words(gptq_pack(stored.T, bits).T),
            "scales": scales,
            "g_idx": (torch.arange(into) // (width or into)).int(),
        }
        return files, meaning(codes.T, zeros.T, scales.T, 1, width)

    config = {"quant_method": "gptq", "bits": bits, "group_size": width or -1, "sym": symmetric, "desc_act": False}
    return Kind(name, config | ({"checkpoint_format": version} if version else {}) | more, write)


def awq(name: str, width: int) -> Kind:
    def write(out: int, into: int, random: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        groups = _cells(into, width)
        codes, zeros = random.integers(0, 16, (into, out)), random.integers(0, 16, (groups, out))
        scales = numbers(random, groups, out)
        files = {"qweight": words(awq_pack(codes)), "qzeros": words(awq_pack(zeros)), "scales": scales}
        return files, meaning(codes.T, zeros.T, scales.T, 1, width)

    config = {"quant_method": "awq", "bits": 4, "group_size": width, "zero_point": True, "version": "gemm"}
    return Kind(name, config, write)


TOKEN = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
STATIC = {"num_bits": 8, "type": "int", "dynamic": False, "strategy": "tensor", "symmetric": False}
HF_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
KINDS = {
    kind.name: kind
    for kind in (
        ct("ct-w8a8-channel", 8, "channel", activations=TOKEN, packed=False),
        ct("ct-w8a8-tensor-static", 8, "tensor", activations=STATIC, packed=False, scale=torch.float32),
        ct("ct-w4a8-g32", 4, "group", 32, activations=TOKEN, packed=False),
        ct("ct-int8-zeros", 8, "channel", symmetric=False, packed=False),
        ct("ct-w4a16-g32", 4, "group", 32),
        ct("ct-w4a16-g64-zeros", 4, "group", 64, symmetric=False, scale=torch.float16),
        ct("ct-w4a16-g128", 4, "group", 128),
        ct("ct-w4a16-g128-zeros", 4, "group", 128, symmetric=False),
        ct("ct-w4a16-channel", 4, "channel"),
        ct("ct-w4a16-channel-zeros", 4, "channel", symmetric=False),
        ct("ct-w4a16-tensor", 4, "tensor"),
        ct("ct-w4a16-float32-scales", 4, "group", 32, scale=torch.float32),
        ct("ct-w8a16-channel", 8, "channel"),
        ct("ct-w8a16-g32", 8, "group", 32),
        ct("ct-w8a16-g64-zeros", 8, "group", 64, symmetric=False),
        ct("ct-w8a16-g128", 8, "group", 128, scale=torch.float16),
        ct_fp8("ct-fp8-tensor", "tensor", 0, 0, dynamic=False),
        ct_fp8("ct-fp8-channel", "channel", 1, 0),
        ct_fp8("ct-fp8-block", "block", 128, 128),
        ct_fp8("ct-fp8-weight-only", "channel", 1, 0, weight_only=True),
        fp8("fp8-block", 128, 128, HF_FP8 | {"weight_block_size": [128, 128]}, "weight_scale_inv"),
        fp8("fp8-tensor-static", 0, 0, HF_FP8 | {"activation_scheme": "static"}, "weight_scale"),
        gptq("gptq-sym", 4, 128, True, None),
        gptq("gptq-v1-g32", 4, 32, False, "gptq"),
        gptq("gptq-v2-g64", 4, 64, False, "gptq_v2"),
        gptq("gptq-column", 4, 0, True, "gptq_v2", desc_act=True),
        gptq("gptq-8", 8, 64, True, None),
        gptq("gptq-8-column", 8, 0, True, None),
        gptq("gptq-8-asym", 8, 32, False, "gptq"),
        awq("awq-g32", 32),
        awq("awq-g128", 128),
    )
}


def make_quantized(plain: Path, kind: Kind, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """The checkpoint ``plain`` with its linear layers quantized, but those that ``kind.kept`` names: the directories of
    the quantized one, and of one with the floats that it means."""
    random = np.random.default_rng(seed)
    files: Tensors = {}
    floats = load_file(plain / "model.safetensors")
    for name, tensor in list(floats.items()):
        module = name.removesuffix(".weight")
        if tensor.dim() != 2 or "embed" in name or any(part in module for part in kind.kept):
            files[name] = tensor
            continue
        written, floats[name] = kind.write(*tensor.shape, random)
        files |= {f"{module}.{ending}": value.contiguous() for ending, value in written.items()}
    quantized, dense = folder / "quantized", folder / "dense"
    for path, tensors in ((quantized, files), (dense, floats)):
        shutil.copytree(plain, path)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": kind.config}
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, dense
