"""What a rival is: how it is installed, how it gets a checkpoint, and, in its own environment, how it generates.

Standard library only: it is imported in the environment of every rival.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

#: Modules of this package with a class ``Engine``, in the order of the tables.
RIVALS = ("tuili", "llamacpp", "ikllama", "vllm", "openvino", "ort", "hf")

#: A fixed version, so that pip takes the CPU build where its indexes have one (a local version sorts above the plain).
TORCH = "torch==2.13.0"

#: A token and the seconds from the start of ``generate`` until the caller had it.
Timed = tuple[int, float]


class Unavailable(Exception):
    """This arm cannot be run here; the message says why and goes into the table."""


class Session(Protocol):
    """A loaded model. Prompts are ids; decoding is greedy and goes on past the end-of-text token."""

    def generate(self, prompts: Sequence[list[int]], new: int) -> list[list[Timed]]:
        """``new`` tokens for each prompt, all prompts at once, each with the time at which it was there."""
        ...


@dataclass(frozen=True)
class Width:
    """``bits`` per weight that a token reads, scales included; ``group`` names the arms that run side by side."""

    name: str
    bits: float
    group: str


@dataclass(frozen=True)
class Places:
    """Where everything of the harness lies, outside of the repository: environments, checkpoints, conversions."""

    root: Path

    def environment(self, name: str) -> Path:
        return self.root / "environments" / name

    def python(self, name: str) -> Path:
        return self.environment(name) / "bin" / "python"

    def checkpoint(self, shape: str) -> Path:
        return self.root / "checkpoints" / shape

    def converted(self, shape: str, rival: str, width: str) -> Path:
        return self.root / "converted" / shape / f"{rival}-{width}"

    def log(self, name: str) -> Path:
        path = self.root / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Rival(Protocol):
    """One engine. ``install`` and ``convert`` run in the harness and do nothing when it is done already; ``load`` runs
    in the worker. All may raise Unavailable."""

    @property
    def name(self) -> str: ...

    @property
    def widths(self) -> tuple[Width, ...]: ...

    def install(self, places: Places) -> dict[str, str]:
        """The versions of what runs."""
        ...

    def convert(self, shape: str, width: str, places: Places) -> Path:
        """What ``load`` takes, made from the checkpoint of ``shape``."""
        ...

    def launch(self, places: Places, threads: int) -> tuple[Path, dict[str, str]]:
        """The interpreter of the worker, and its environment variables."""
        ...

    def load(self, model: Path, width: str, threads: int) -> Session: ...


def rival(module: str) -> Rival:
    return import_module(f"{__package__}.{module}").Engine()


def shell(command: Sequence[str | Path], log: Path, env: dict[str, str] | None = None) -> None:
    """Run a step of an installation or conversion, its output into ``log``; Unavailable with the last line if it
    fails."""
    with log.open("a") as output:
        print("$", *command, file=output, flush=True)
        done = subprocess.run(
            [str(word) for word in command],
            stdout=output,
            stderr=output,
            env={**os.environ, **(env or {})},
            cwd=log.parent,
        )
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise Unavailable(f"{Path(str(command[0])).name} failed: {lines[-1].strip()[:200]} (log: {log.name})")


def call(
    python: Path,
    function: Callable[..., None],
    arguments: Sequence[object],
    log: Path,
    env: dict[str, str] | None = None,
) -> None:
    """Run a function of this package in another interpreter; it gets its arguments as texts."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import rivals; del sys.path[0]\n"
        f"from {function.__module__} import {function.__name__} as run; run(*sys.argv[2:])"
    )
    root = Path(__file__).resolve().parents[1]
    shell([python, "-c", code, root, *map(str, arguments)], log, env)


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Installed versions of ``packages`` as that interpreter sees them."""
    code = "import importlib.metadata as m, json, sys\nprint(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"not installed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


class Environment:
    """A virtual environment with packages from the index that pip is configured for, made once."""

    def __init__(self, name: str, packages: Sequence[str], without: Sequence[str] = ()):
        self.name, self.packages, self.without = name, tuple(packages), tuple(without)

    def make(self, places: Places) -> Path:
        """Its interpreter. ``without`` are packages that the others pull in and that break them."""
        python, log = places.python(self.name), places.log(f"install-{self.name}")
        done = places.environment(self.name) / ".installed"
        wanted = "\n".join((*self.packages, *(f"-{each}" for each in self.without)))
        if done.exists() and done.read_text() == wanted:
            return python
        if not python.exists():
            shell([sys.executable, "-m", "venv", places.environment(self.name)], log)
        shell([python, "-m", "pip", "install", *self.packages], log)
        if self.without:
            shell([python, "-m", "pip", "uninstall", "-y", *self.without], log)
        done.write_text(wanted)
        return python
