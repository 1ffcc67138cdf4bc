"""Formats in a process that has imported nothing else: each finds the ops that multiply it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch
from tuili.quant.place import place_on
from tuili.quant.scheme import SCHEMES
from tuili.quant.weight import Weight
for name, scheme in SCHEMES.items():
    weight = Weight.of(torch.randn(32, 128), scheme, place_on("cpu"))
    print(name, tuple(weight.matmul(torch.randn(2, 128)).shape))
"""


def test_every_format_finds_its_ops() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 5
    assert all(line.endswith("(2, 32)") for line in lines)
