"""Runs pieces as processes of their own, within a budget, and keeps what they found in one file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu.place import DONE, FAILED, LEFT_OUT, Place, write
from tuili.bench.provenance import provenance

if TYPE_CHECKING:
    from gpu.pieces import Piece

CHECK = Path(__file__).with_name("check.py")
#: A process that lost its CUDA context ends with this, and is started anew: it goes on behind what it did.
AGAIN = 75
#: The most processes of a piece, crashes included.
STARTS = 4
#: A piece that could have less than this is not begun.
LEAST_SECONDS = 20


class Driver:
    """Runs pieces within ``budget`` seconds and keeps ``check.json`` in ``folder`` up to date."""

    def __init__(self, folder: Path, tiny: bool, budget: float):
        self.folder, self.tiny = folder, tiny
        self.end = time.monotonic() + budget
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.found: dict[str, Any] = {
            "benchmark": "gpu-check",
            "tiny": tiny,
            "provenance": {**provenance(), "command": " ".join(["check.py", *sys.argv[1:]])},
            "versions": gpu_versions(),
            "budget_seconds": budget,
            "pieces": {},
        }
        self.found["pieces"] = self._before()

    def _before(self) -> dict[str, Any]:
        """Pieces that the folder's file holds already, of the same source and versions: each can have its own run."""
        path = self.folder / "check.json"
        if not path.exists():
            return {}
        before = json.loads(path.read_text())
        same = all(before[key] == self.found[key] for key in ("tiny", "versions"))
        same &= before["provenance"]["commit"] == self.found["provenance"]["commit"]
        return before["pieces"] if same else {}

    def run(self, pieces: list[Piece]) -> None:
        stages: dict[str, list[Piece]] = {}
        for piece in pieces:
            stages.setdefault(piece.stage or piece.name, []).append(piece)
        try:
            for stage in stages.values():
                self.run_stage(stage)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.save()

    def run_stage(self, pieces: list[Piece]) -> None:
        """Pieces beside each other, each until it ends, its time or the budget's."""
        running = []
        for piece in pieces:
            left = self.end - time.monotonic()
            if left < min(LEAST_SECONDS, piece.seconds):
                self.note(piece, 0, LEFT_OUT, "the budget was spent")
                continue
            limit = left if self.tiny else min(left, piece.seconds)
            running.append(Running(piece, limit, self))
        while running:
            time.sleep(0.1)
            running = [r for r in running if not r.over()]

    def note(self, piece: Piece, seconds: float, status: str, why: str = "") -> None:
        entries = Place("cpu", self.tiny, self.scratch / f"{piece.name}.json").entries
        bad = [name for name, entry in entries.items() if entry["status"] == FAILED]
        self.found["pieces"][piece.name] = {
            "status": status,
            **({"why": why} if why else {}),
            **({"arm": {"model": piece.arm.model, "width": piece.arm.width}} if piece.arm else {}),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "entries": entries,
        }
        self.save()
        tail = f": {why}" if why else f", {len(bad)} of {len(entries)} failed" if bad else f", {len(entries)} done"
        print(f"{piece.name:26} {status:8} {seconds:6.1f} s{tail}", flush=True)
        for name in bad:
            print(f"    {name}: {entries[name]['error'].splitlines()[0][:300]}", flush=True)

    def save(self) -> None:
        self.found["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
        write(self.folder / "check.json", self.found)

    def failures(self) -> list[str]:
        """What went wrong, of this run and of those before that the file still tells of."""
        pieces = self.found["pieces"]
        broken = [name for name, piece in pieces.items() if piece["status"] == FAILED]
        return broken + [
            f"{name}: {entry}"
            for name, piece in pieces.items()
            for entry, found in piece["entries"].items()
            if found["status"] == FAILED
        ]


class Running:
    """A piece's process. Its own deadline comes before ours, so that it can end well."""

    def __init__(self, piece: Piece, limit: float, driver: Driver):
        self.piece, self.driver = piece, driver
        self.began = time.monotonic()
        self.limit = limit
        self.starts = 0
        self.log = driver.scratch / f"{piece.name}.log"
        self.start()

    def start(self) -> None:
        self.starts += 1
        left = self.began + self.limit - time.monotonic()
        command = [sys.executable, str(CHECK), "--piece", self.piece.name]
        command += ["--out", str(self.driver.scratch / f"{self.piece.name}.json"), "--seconds", str(0.8 * left)]
        command += ["--tiny"] if self.driver.tiny else []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def over(self) -> bool:
        """Whether it ended (then it was noted) or had to be stopped."""
        code, seconds = self.process.poll(), time.monotonic() - self.began
        if code is None and seconds < self.limit:
            return False
        if code in (AGAIN, -6, -11) and self.starts < STARTS and seconds < 0.7 * self.limit:
            self.start()
            return False
        if code is None:
            self.stop()
            self.driver.note(self.piece, seconds, FAILED, f"stopped after {seconds:.0f} s")
        elif code:
            words = self.log.read_text(errors="replace")[-3000:].strip()
            self.driver.note(self.piece, seconds, FAILED, f"ended with {code}: {words}")
        else:
            self.driver.note(self.piece, seconds, DONE)
        return True

    def stop(self) -> None:
        """End the process and what it started: the group is its own."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def gpu_versions() -> dict[str, str]:
    """What the figures depend on beyond the provenance."""
    found = {}
    for name in ("triton", "transformers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found |= {"card": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found
