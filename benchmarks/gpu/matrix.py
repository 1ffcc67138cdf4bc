"""Test suites that hold on a card as they do interpreted: law 5's matrix through the engine, and bits of kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
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
    """How many tests passed. RuntimeError that names those that failed, or where none ran."""
    report = place.path.with_suffix(".xml")
    workers = ["-n", str(1 if place.tiny else WORKERS)]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-m", "not slow", "-k", wanted, *workers]
    command += [f"--junitxml={report}", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if place.tiny else "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not report.exists():
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    cases = list(ET.parse(report).getroot().iter("testcase"))
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    failures = [
        f"{case.get('name')}: {(bad.get('message') or '').splitlines()[:1]}"
        for case in cases
        for bad in [*case.findall("failure"), *case.findall("error")]
    ]
    passed = len(cases) - len(skipped) - len(failures)
    if failures or not passed:
        tail = "" if failures else done.stdout[-1500:]
        raise RuntimeError(f"{len(failures)} of {len(cases)} tests failed\n" + "\n".join(failures[:40]) + tail)
    return {"tests": passed, "skipped": len(skipped)}
