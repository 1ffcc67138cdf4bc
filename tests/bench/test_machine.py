"""The machine probe: timing against a known duration, caches from the system's files, counts that are put back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tuili.bench import machine


def test_best_is_the_duration_of_the_fastest_run() -> None:
    took = machine.best(lambda: time.sleep(0.01), 0.05)
    assert 0.01 <= took < 0.1


def test_thread_counts_end_with_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, counts in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])):
        monkeypatch.setattr("tuili.base.hardware.probe", lambda cores=cores: type("Here", (), {"cores": cores}))
        assert machine.thread_counts() == counts


def test_caches_and_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, (kind, level, size, shared) in enumerate(
        [
            ("Data", 1, "32K", "0"),
            ("Instruction", 1, "32K", "0"),
            ("Unified", 2, "1024K", "0"),
            ("Unified", 3, "32768K", "0-3,8-11"),
        ]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("type", kind), ("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    found = machine.caches()
    assert found["L2"] == {"bytes": 1 << 20, "cores": 1}
    assert found["L3"] == {"bytes": 32 << 20, "cores": 8}
    sizes = {"L1": 1 << 14, "L2": 1 << 19, "L3": 16 << 20, "memory": 64 << 20}
    assert {level: machine.level_of(size, 1, found) for level, size in sizes.items()} == {
        level: level for level in sizes
    }
    assert machine.level_of(2 << 20, 2, found) == "L2"
    assert machine.level_of(64 << 20, 8, found) == "memory"
    assert machine.level_of(64 << 20, 16, found) == "L3"
    assert machine.level_of(1, 1, {}) == "unknown"


def test_thread_settings_are_put_back() -> None:
    import torch

    from tuili.ops import cpu

    before = torch.get_num_threads(), cpu.describe().threads
    with machine.team(2):
        assert torch.get_num_threads() == 2
    assert (torch.get_num_threads(), cpu.describe().threads) == before
