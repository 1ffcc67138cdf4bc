"""Checkpoints written by the real library, where it is installed (pip install --no-deps compressed-tensors loguru)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny

from tuili.models.checkpoint import open_checkpoint
from tuili.models.weights import load_model, to_hf
from tuili.quant.scheme import Scheme

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: it is no dependency")

PRESETS = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")


def ends(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest weight of each that shares a scale."""
    if args.strategy == "block":
        high, wide = args.block_structure
        blocks = weight.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    shape = {"tensor": (1, -1), "channel": (len(weight), -1), "group": (-1, args.group_size or 1)}[str(args.strategy)]
    rows = weight.reshape(shape)
    return rows.amin(1), rows.amax(1)


@pytest.mark.parametrize("preset", PRESETS)
def test_files_of_the_library_mean_what_it_says(preset: str, tiny: Tiny, tmp_path: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    plain = tiny("llama", dtype="bfloat16", hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    quantized = {name: module for name, module in model.named_modules() if hasattr(module, "weight_scale")}
    for module in quantized.values():
        args = module.quantization_scheme.weights
        scales, zeros = calculate_qparams(*ends(module.weight.data.float(), args), args)
        module.weight_scale.data.copy_(scales.view(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zeros.view(module.weight_zero_point.shape))
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    compressor.decompress_model(model)
    have = dict(to_hf(load_model(open_checkpoint(tmp_path), "float32", 64, scheme=Scheme())))
    assert len(quantized) == 7
    for name, module in model.named_modules():
        if name in quantized:
            assert torch.equal(have[f"{name}.weight"].bfloat16(), module.weight.data), name
