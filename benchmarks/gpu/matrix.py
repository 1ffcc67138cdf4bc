"""Test suites that hold on a card as they do interpreted: law 5's matrix through the engine, and bits of kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from gpu.place import Entry, Place

ROOT = Path(__file__).resolve().parents[2]
#: What to run: files, and of them the tests that ``-k`` picks (``--tiny``: of those, a few).
SUITES = {
    "kernels' bits": (["tests/ops_triton"], "not compiles_for", "4_bits"),
    "engine": (["tests/runtime/test_device_triton.py"], "test", "kv8"),
    "engine, deterministic": (["tests/test_device_equality.py"], "test", "test"),
}
#: Test processes beside each other; the host is what takes the time.
WORKERS = 5


def run(place: Place) -> None:
    for name, (files, wanted, few) in SUITES.items():
        place.attempt(name, lambda f=files, w=wanted, t=few: suite(f, t if place.tiny else w, place))


def suite(files: list[str], wanted: str, place: Place) -> Entry:
    """How many tests passed, ``stopped`` if the time ended before them. RuntimeError that names those that failed, or
    where none ran."""
    workers = ["-n", str(1 if place.tiny else WORKERS)]
    command = [sys.executable, "-m", "pytest", "-v", *files, "-m", "not slow", "-k", wanted, *workers]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if place.tiny else "0"}
    log, stopped = place.path.with_suffix(".log"), False
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(max(1.0, place.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # its workers end when they hear no more of it
            process.wait()
            stopped = True
    text = log.read_text(errors="replace")
    said = {word: re.findall(rf"\b{word} (\S.*)", text) for word in ("PASSED", "SKIPPED", "FAILED", "ERROR")}
    failures = list(dict.fromkeys(name.split(" - ")[0].strip() for name in said["FAILED"] + said["ERROR"]))
    if failures or not said["PASSED"]:
        words = f"{len(failures)} failed, {len(said['PASSED'])} passed\n" + "\n".join(failures[:40])
        raise RuntimeError(f"{words}\n{text[-4000:]}")
    return {"tests": len(said["PASSED"]), "skipped": len(said["SKIPPED"]), "stopped": stopped}
