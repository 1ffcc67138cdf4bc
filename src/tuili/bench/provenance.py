"""Where a figure comes from: machine, commit, versions, resolved config, workload, date; written into every result."""

from __future__ import annotations

import dataclasses
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import tuili
from tuili.base import hardware
from tuili.base.config import Config
from tuili.bench.workload import Workload


def provenance(workload: Workload | None = None, config: Config | None = None) -> dict[str, Any]:
    """``kind`` is "measured": what is simulated or cited never takes this form (law 15)."""
    return {
        "kind": "measured",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "commit": commit(),
        "versions": versions(),
        "command": command(),
        "config": dataclasses.asdict(config) if config else None,
        "workload": workload.describe() if workload else None,
    }


def results_folder(root: Path) -> Path:
    """Where results of this machine, taken today, belong under ``root``: CPUs of one name differ in what they can."""
    here = hardware.probe()
    kind = re.sub(r"[^a-z0-9]+", "-", f"{here.cpu} {here.vectors}".lower()).strip("-")
    return root / f"{datetime.now(UTC):%Y-%m-%d}-{kind}"


def command() -> str:
    """What was typed, without the API key."""
    words = ["tuili", *sys.argv[1:]]
    hidden = ["***" if before == "--api-key" else word for before, word in zip(["", *words], words, strict=False)]
    return " ".join("--api-key=***" if word.startswith("--api-key=") else word for word in hidden)


def machine() -> dict[str, Any]:
    here = hardware.probe()
    return {
        "cpu": here.cpu,
        "cores": here.cores,
        "isa": sorted(here.isa),
        "total_memory": here.total_memory,
        "available_memory": here.available_memory,
        "load_average": _load_average(),
        "gpu": here.gpu,
        "os": platform.platform(),
    }


def _load_average() -> float | None:
    """Over the last minute: tells whether something else was running when the measurement began."""
    import psutil

    return round(psutil.getloadavg()[0], 2)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "tuili": tuili.__version__}
    try:
        found["torch"] = metadata.version("torch")
    except metadata.PackageNotFoundError:
        found["torch"] = "not installed"
    return found


def commit() -> dict[str, Any] | None:
    """Commit and dirty flag of the source tree; None when it is not a git checkout."""
    root = Path(tuili.__file__).parent
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    return {"id": head, "dirty": bool(_git(root, "status", "--porcelain"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
