"""Memory of this test process, as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def resident_memory() -> int:
    return _status("VmRSS")


def peak_memory() -> int:
    """The most since ``reset_peak_memory``."""
    return _status("VmHWM")


def reset_peak_memory() -> None:
    """Skips the test where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("no /proc/self/clear_refs: the peak of memory can not be set back here")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10
