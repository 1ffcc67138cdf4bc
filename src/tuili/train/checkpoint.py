"""A checkpoint of a run: one safetensors file with weights, optimizer state and, in its header, the rest. No pickle.

A new checkpoint takes the place of the old in one rename, so that a crash at any moment leaves one or the other.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tuili.base.errors import ConfigError

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """How far a run is. ``index`` counts the documents of ``epoch``; ``seconds`` count evaluating and saving too."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    tokens: int = 0
    learned: int = 0
    seconds: float = 0.0


def save(file: Path, master: Tensors, state: Tensors, progress: Progress, recipe: dict[str, Any]) -> None:
    """Write the checkpoint to ``file``, over an older one."""
    fresh = file.with_name(file.name + ".new")
    tensors = {f"master/{n}": w for n, w in master.items()} | {f"optimizer/{n}": w for n, w in state.items()}
    header = {"progress": json.dumps(asdict(progress)), "recipe": json.dumps(recipe)}
    save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, fresh, header)
    with fresh.open("rb") as written:  # on the disk before it has the name, or a power cut leaves neither
        os.fsync(written.fileno())
    fresh.replace(file)


def load(file: Path, master: Tensors, state: Tensors) -> Progress:
    """Read the checkpoint ``file`` into ``master`` and ``state``, in place. Raises ConfigError if that fails."""
    if not file.is_file():
        raise ConfigError(f"no checkpoint at {file} to resume from; start without --resume")
    into = {f"master/{n}": w for n, w in master.items()} | {f"optimizer/{n}": w for n, w in state.items()}
    try:
        with safe_open(file, "pt") as opened:
            progress = Progress(**json.loads(opened.metadata()["progress"]))
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            if shapes != {name: tuple(tensor.shape) for name, tensor in into.items()}:
                raise ConfigError(f"the checkpoint at {file} is of another model or optimizer than the recipe's")
            for name, tensor in into.items():
                tensor.copy_(opened.get_tensor(name))
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is no checkpoint of a run: {error}") from error
    return progress
