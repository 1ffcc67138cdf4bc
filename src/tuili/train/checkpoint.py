"""A checkpoint of a run: ``state.safetensors`` (weights, optimizer state) and ``state.json`` (the rest). No pickle.

A new checkpoint takes the place of the old in one rename, so that a crash leaves one or the other.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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


def save(folder: Path, master: Tensors, state: Tensors, progress: Progress, recipe: dict[str, Any]) -> None:
    """Write the checkpoint to ``folder``, over an older one."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {f"master/{n}": w for n, w in master.items()} | {f"optimizer/{n}": w for n, w in state.items()}
    save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, fresh / "state.safetensors")
    (fresh / "state.json").write_text(json.dumps({"progress": asdict(progress), "recipe": recipe}, indent=2) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, master: Tensors, state: Tensors) -> Progress:
    """Read the checkpoint in ``folder`` into ``master`` and ``state``, in place. Raises ConfigError if that fails."""
    if not (folder / "state.json").is_file():
        raise ConfigError(f"no checkpoint at {folder} to resume from; start without --resume")
    tensors = load_file(folder / "state.safetensors")
    into = {f"master/{n}": w for n, w in master.items()} | {f"optimizer/{n}": w for n, w in state.items()}
    shapes = ({n: tuple(t.shape) for n, t in x.items()} for x in (tensors, into))
    if next(shapes) != next(shapes):
        raise ConfigError(f"the checkpoint at {folder} is of another model or optimizer than the recipe's")
    for name, tensor in into.items():
        tensor.copy_(tensors[name])
    return Progress(**json.loads((folder / "state.json").read_text())["progress"])
