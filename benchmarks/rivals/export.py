"""The environment in which checkpoints are converted for rivals that read formats of their own: heavy, never timed."""

from __future__ import annotations

from rivals.rival import TORCH, Environment

EXPORT = Environment(
    "export",
    (
        TORCH,
        "optimum-intel",
        "nncf",
        "openvino",
        "openvino-tokenizers",
        "onnxruntime-genai",
        "onnx-ir",
        "sentencepiece",
        "pyyaml",
    ),
    without=("torchvision", "torchaudio", "torchcodec"),
)
